"""`modeldepot version`."""

from __future__ import annotations

import click


@click.command()
def version() -> None:
    """Show the version, and those of what it builds on."""
    import platform
    from importlib import metadata

    for name in ("modeldepot", "torch", "onnxruntime-gpu", "onnxruntime", "litestar"):
        try:
            click.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    click.echo(f"python {platform.python_version()}")
