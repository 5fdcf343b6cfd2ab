"""The peers' own environment, bench/.venv: nothing of theirs gets into ours, nor of ours into theirs.

    python -m bench.environment [--python python3.11]

Installs what bench/peers.txt names. What cannot be installed is told and left out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
VENV = HERE / ".venv"
PYTHON = VENV / "bin" / "python"
WANTED = HERE / "peers.txt"
DONE = VENV / "peers.txt"  # what was wanted when this was made
ASK = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def lines() -> list[str]:
    return [line for line in WANTED.read_text().splitlines() if line and line[0] != "#"]


def install(*lines: str) -> str:
    """What is wrong, in a line; empty: nothing."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet", "install",
               "--only-binary", ":all:", "--constraint", str(WANTED), *lines]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        return ""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    return errors[-1] if errors else f"pip ended with {ended.returncode}"


def up_to_date() -> bool:
    return DONE.is_file() and DONE.read_text() == WANTED.read_text()


def make(python: str = sys.executable) -> None:
    if up_to_date():
        return
    print("installing the peers into bench/.venv (about 600 MB: minutes, once)", flush=True)
    if not PYTHON.is_file():
        subprocess.run([python, "-m", "venv", str(VENV)], check=True)
    if install(*lines()):  # not all at once: then each that can be had
        for line in lines():
            if wrong := install(line):
                print(f"left out: {line}: {wrong}", file=sys.stderr)
    DONE.write_text(WANTED.read_text())


def versions() -> dict[str, str]:
    """Of what is installed there; empty without the environment."""
    if not PYTHON.is_file():
        return {}
    names = [re.split(r"[=<>]", line)[0] for line in lines()]
    ended = subprocess.run([str(PYTHON), "-c", ASK, *names], capture_output=True, text=True)
    return dict(re.findall(r'"([^"]+)": "([^"]+)"', ended.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable)
    make(parser.parse_args().python)
    for name, version in versions().items():
        print(f"{name} {version}")


if __name__ == "__main__":
    main()
