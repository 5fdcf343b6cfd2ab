"""The repository that Triton's clients are tried on: ONNX and python models, and what is made of them.

simple, simple_int8, simple_string, simple_identity    as in `triton_models`
labelled              simple, whose sums have labels
sums, sums_oldest     a sequence's sum, by number; sums_text: by name
repeat_int32          decoupled: each element of IN, after its DELAY in ms
bls                   asks the model that it is told to ask
chain                 simple, and of its sums and differences those again: 2 * INPUT0, 2 * INPUT1
python_identity       OUTPUT0 = INPUT0, any bytes
talkative             answers what it was told besides tensors
held                  answers when a test lets it
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.server import add_model
from tests.sequence_models import write_sums
from tests.triton_models import LABELS, write_all, write_simple
from tests.triton_python import SOURCES

CONFIG = 'backend: "python"\nmax_batch_size: %d\n%s\n%s\n%s\n'
CHAIN = """
platform: "ensemble" max_batch_size: 8 %s %s
ensemble_scheduling { step [
  { model_name: "simple" model_version: -1
    input_map [ { key: "INPUT0" value: "INPUT0" }, { key: "INPUT1" value: "INPUT1" } ]
    output_map [ { key: "OUTPUT0" value: "sum" }, { key: "OUTPUT1" value: "difference" } ] },
  { model_name: "add_sub" model_version: -1
    input_map [ { key: "INPUT0" value: "sum" }, { key: "INPUT1" value: "difference" } ]
    output_map [ { key: "OUTPUT0" value: "OUTPUT0" }, { key: "OUTPUT1" value: "OUTPUT1" } ] }
] }
"""
OLDEST = "oldest { max_candidate_sequences: 4 }"
DECOUPLED = "model_transaction_policy { decoupled: true }"


def tensors(kind: str, **said: str) -> str:
    """`said`: name -> "INT32 [16]"."""
    each = []
    for name, what in said.items():
        datatype, _, dims = what.partition(" ")
        each.append(f'{{ name: "{name}" data_type: TYPE_{datatype} dims: {dims} }}')
    return f"{kind} [ {', '.join(each)} ]"


def write_python(
    repo: Path,
    name: str,
    source: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    *,
    rows: int = 0,
    more: str = "",
) -> None:
    """`source`: one of those in tests/data/triton."""
    folder = repo / name / "1"
    folder.mkdir(parents=True)
    shutil.copy(SOURCES / f"{source}.py", folder / "model.py")
    config = CONFIG % (rows, tensors("input", **inputs), tensors("output", **outputs), more)
    (folder.parent / "config.pbtxt").write_text(config)


def write_chain(repo: Path) -> None:
    both = dict.fromkeys(("INPUT0", "INPUT1"), "INT32 [16]")
    made = dict.fromkeys(("OUTPUT0", "OUTPUT1"), "INT32 [16]")
    write_python(repo, "add_sub", "add_sub", both, made, rows=8)
    (repo / "chain").mkdir()
    text = CHAIN % (tensors("input", **both), tensors("output", **made))
    (repo / "chain" / "config.pbtxt").write_text(text)


def write_repository(repo: Path, gates: Path) -> None:
    write_all(repo)
    write_simple(repo, "labelled", labels=LABELS[:12])
    write_sums(repo, "sums")
    write_sums(repo, "sums_oldest", strategy=OLDEST)
    write_sums(repo, "sums_text", ids="BYTES")
    write_python(
        repo, "repeat_int32", "repeat", {"IN": "INT32 [-1]", "DELAY": "UINT32 [-1]"},
        {"OUT": "INT32 [1]", "IDX": "UINT32 [1]"}, more=DECOUPLED,
    )  # fmt: skip
    rows = "INT32 [-1, 16]"
    write_python(
        repo, "bls", "bls_sync", {"INPUT0": rows, "INPUT1": rows, "MODEL_NAME": "STRING [1]"},
        {"OUTPUT0": rows, "OUTPUT1": rows},
    )  # fmt: skip
    write_chain(repo)
    some = "STRING [-1]"
    write_python(repo, "python_identity", "identity", {"INPUT0": some}, {"OUTPUT0": some}, rows=8)
    write_python(repo, "talkative", "talkative", {"X": "INT32 [1]"}, {"SAID": "STRING [1]"})
    gates.mkdir()
    add_model(repo, gates, "held", infer="infer")
