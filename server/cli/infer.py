"""`modeldepot infer`: one request from a file, its answer for people or into a file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from server.cli.exits import NOT_FOUND, USAGE, Failure
from server.cli.options import talks_to_a_server

if TYPE_CHECKING:
    from server.cli.client import Client
    from server.cli.wire import Answer

SHOWN = 60  # elements of an output, then it is cut in the middle


@click.command()
@click.argument("model")
@click.option(
    "-f", "--file", "source", required=True, metavar="FILE", help="in.npz, in.json or - (JSON)."
)
@click.option("--version", type=click.IntRange(min=1), help="Of the model.  [default: highest]")
@click.option("--output", metavar="FILE", help="out.npz or out.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the outputs as JSON.")
@talks_to_a_server
async def infer(
    client: Client,
    model: str,
    source: str,
    version: int | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Send one request to MODEL and show its outputs.

    FILE is an .npz with one array per input, JSON such as {"input": [[1, 2]]}, or a whole KServe V2
    request as JSON.
    """
    from server.cli.wire import answer_of

    if output is not None and Path(output).suffix not in (".npz", ".json"):
        raise Failure("--output must end in .npz or .json", USAGE)
    body, headers = await _request(client, model, version, source)
    began = time.perf_counter()
    said = await client.infer(model, version, body, headers)
    took_ms = (time.perf_counter() - began) * 1e3
    answer = answer_of(said.content, said.headers)
    if output is not None:
        _save(Path(output), answer)
    if as_json:
        click.echo(json.dumps(_plain(answer)))
    else:
        click.echo(f"{answer.model} version {answer.version}, {took_ms:.1f} ms")
        if output is None:
            click.echo("\n".join(lines_of(answer)))


async def _request(
    client: Client, model: str, version: int | None, source: str
) -> tuple[bytes, dict[str, str]]:
    from server.cli.wire import arrays_of, request_of

    given = _read_npz(source) if source.endswith(".npz") else _read_json(source)
    if isinstance(given, bytes):
        return given, {"content-type": "application/json"}
    found = await client.metadata(model, version)
    wanted = {i["name"]: i["datatype"] for i in found.get("inputs", [])}
    return request_of(arrays_of(given, wanted), wanted)


def _read_json(source: str) -> bytes | dict[str, Any]:
    """A whole V2 request as its bytes, or values by input."""
    raw = sys.stdin.buffer.read() if source == "-" else _bytes_of(source)
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise Failure(f"'{source}' is not JSON: {error}", USAGE) from error
    if not isinstance(found, dict):
        raise Failure(f"'{source}' must hold a JSON object", USAGE)
    inputs = found.get("inputs")
    whole = isinstance(inputs, list) and all(isinstance(i, dict) for i in inputs)
    return raw if whole else found


def _bytes_of(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read '{source}': {error.strerror}", NOT_FOUND) from error


def _read_npz(source: str) -> dict[str, Any]:
    """Arrays by input."""
    import zipfile
    from io import BytesIO

    import numpy as np

    raw = BytesIO(_bytes_of(source))
    try:
        with np.load(raw, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise Failure(f"'{source}' cannot be read as .npz: {error}", USAGE) from error


def _plain(answer: Answer) -> dict[str, Any]:
    from server.cli.wire import readable

    return {
        "model_name": answer.model,
        "model_version": answer.version,
        "outputs": [
            {
                "name": t.name,
                "datatype": t.datatype,
                "shape": list(t.shape),
                "data": readable(t).reshape(-1).tolist(),
            }
            for t in answer.outputs
        ],
    }


def _save(path: Path, answer: Answer) -> None:
    import numpy as np

    from server.cli.wire import readable

    try:
        if path.suffix == ".json":
            path.write_text(json.dumps(_plain(answer)) + "\n")
        else:
            arrays: dict[str, Any] = {t.name: readable(t) for t in answer.outputs}
            np.savez(path, allow_pickle=False, **arrays)
    except OSError as error:
        raise Failure(f"cannot write '{path}': {error.strerror}") from error


def lines_of(answer: Answer) -> list[str]:
    import numpy as np

    from server.cli.wire import readable

    lines: list[str] = []
    for tensor in answer.outputs:
        lines.append(f"{tensor.name}  {tensor.datatype}  {list(tensor.shape)}")
        text = np.array2string(readable(tensor), threshold=SHOWN, precision=5, suppress_small=True)
        lines += [f"  {line}" for line in text.splitlines()]
    return lines
