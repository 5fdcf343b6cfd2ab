"""What is installed, against what we ask for and what we were tested with (constraints.txt)."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from server.cli.checkup.finding import Finding, fail, ok, warn

US = "modeldepot"
SHOWN = (US, "torch", "onnxruntime-gpu", "onnxruntime", "transformers")
INSTEAD = {"onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime-gpu"}
FEW = 5  # named where many differ
# Beside the installed packages (the image), or beside the sources.
LOCKS = (Path(sys.prefix, "constraints.txt"), Path(__file__).parents[3] / "constraints.txt")
Versions = Callable[[str], str | None]


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions(
    wanted: list[str] | None = None,
    lock: Path | None = None,
    version_of: Versions = installed,
) -> list[Finding]:
    """`wanted`: requirements as pyproject.toml writes them; ours, where None."""
    from packaging.requirements import Requirement

    name = "versions"
    if version_of("onnxruntime") and version_of("onnxruntime-gpu"):
        said = "onnxruntime and onnxruntime-gpu are both installed, over each other"
        return [fail(name, said, "uninstall both, then install the one that you want")]
    wrong = []
    for requirement in map(Requirement, _ours() if wanted is None else wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version_of(requirement.name)
        if found is None:
            found = version_of(INSTEAD.get(requirement.name, requirement.name))
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} ({found or 'missing'})")
    if wrong:
        todo = "install again: pip install -c constraints.txt . (or make run)"
        return [fail(name, f"not as needed: {', '.join(wrong)}", todo)]
    return [_locked(name, lock or next(filter(Path.is_file, LOCKS), None), version_of)]


def _ours() -> list[str]:
    try:
        return metadata.requires(US) or []
    except metadata.PackageNotFoundError:  # sources that run without being installed
        return []


def _locked(name: str, lock: Path | None, version_of: Versions) -> Finding:
    found = ((each, version_of(each)) for each in SHOWN)
    said = ", ".join(
        [f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in found if v is not None)]
    )
    if lock is None:
        return ok(name, f"{said}; no constraints.txt to compare with")
    differ = [
        f"{each} {have} (tested {tested})"
        for each, tested in _pairs(lock)
        # A build of its own ("+cpu") is the same version.
        if (have := version_of(each)) is not None and have.partition("+")[0] != tested
    ]
    if differ:
        more = f" and {len(differ) - FEW} more" if len(differ) > FEW else ""
        said += f"; other than in constraints.txt: {', '.join(differ[:FEW])}{more}"
        return warn(name, said, "what was tested together: pip install -c constraints.txt")
    return ok(name, f"{said}; as in constraints.txt")


def _pairs(lock: Path) -> Iterator[tuple[str, str]]:
    for line in lock.read_text().splitlines():
        if found := re.fullmatch(r"([A-Za-z0-9._-]+)==([^ ;]+)", line.strip()):
            yield found[1], found[2]
