"""Models written in Python, in a worker: what they may do, and what they are told when it is wrong."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from repository.config import TensorConfig
from repository.errors import (
    IncompleteFilesError,
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
    RepositoryError,
)
from repository.hosts.zygotes import Zygotes
from repository.messages import TensorSpec
from repository.tensors import DATATYPES, Tensor
from tests import models
from tests.hosting import ask, fails, forking, hosted, make, one

pytestmark = pytest.mark.asyncio(loop_scope="module")

ECHO = """
    class Model:
        def infer(self, inputs):
            return inputs
"""
X = Tensor.of("x", np.zeros((2, 4), np.float32))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygotes() -> AsyncIterator[Zygotes]:
    """For all tests: their workers are forked from the same."""
    async with forking() as found:
        yield found


async def refused(
    zygotes: Zygotes,
    tmp_path: Path,
    source: str,
    kind: type[RepositoryError] = LoadFailedError,
    **config: Any,
) -> str:
    """The text with which a model does not load."""
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python", **config)
    host = make(spec, tmp_path / "s", zygotes)
    text = await fails(lambda: host.load(spec, ["cpu"]), kind)
    await host.stop(5.0)
    assert str(tmp_path) not in text
    return text


async def answers_with(zygotes: Zygotes, tmp_path: Path, returns: str, **config: Any) -> str:
    """The text with which an inference fails whose model returns `returns`."""
    source = f"""
        import numpy as np
        class Model:
            def infer(self, inputs):
                return {returns}
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python", **config)
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        return await fails(lambda: host.infer(ask(X)), InferenceFailedError)


async def test_every_datatype_makes_the_round_trip_unchanged(zygotes, tmp_path):
    spec = models.spec_of(models.python_model(tmp_path / "m/1", ECHO), "python")
    samples = {n: np.array([[0, 1], [2, 100]]).astype(d.dtype) for n, d in DATATYPES.items()}
    samples["BYTES"] = np.array([b"", b"\xff\x00", "bé".encode()], dtype=object)
    async with hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        assert loaded.inputs == () and loaded.platform == "python"
        for datatype, array in samples.items():
            sent = Tensor.of("x", array, datatype)
            (got,) = (await host.infer(ask(sent))).outputs
            told = "UINT16" if datatype == "BF16" else datatype  # nobody declared it
            assert (got.datatype, tuple(got.shape)) == (told, array.shape)
            assert bytes(got.data) == bytes(sent.data)


async def test_a_declared_bf16_output_is_given_as_its_bits(zygotes, tmp_path):
    config = {"outputs": (TensorConfig(name="x", datatype="BF16", shape=(-1,)),)}
    spec = models.spec_of(models.python_model(tmp_path / "m/1", ECHO), "python", **config)
    sent = Tensor.of("x", np.array([0x3F80], np.uint16), "BF16")
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        (got,) = (await host.infer(ask(sent))).outputs
        assert got.datatype == "BF16" and bytes(got.data) == bytes(sent.data)


async def test_a_model_is_told_its_context_and_may_import_its_own_files(zygotes, tmp_path):
    source = """
        import numpy as np
        import helper
        from . import sibling
        class Other:
            inputs = [("x", "FP32", (-1, 4))]
            outputs = [("y", "BYTES", (-1,))]
            def load(self, context):
                self.told = [context.model, context.device, context.version, context.threads,
                             context.parameters["scale"], helper.WORD, sibling.WORD,
                             (context.folder / "model.py").exists()]
            def infer(self, inputs):
                import late
                return {"y": np.array([str(t) for t in [*self.told, late.WORD]])}
    """
    folder = models.python_model(
        tmp_path / "m/1", source, helper="WORD = 'h'", sibling="WORD = 's'", late="WORD = 'l'"
    )
    options = {"class": "Other", "parameters": {"scale": 1.5}, "threads": 1}
    spec = models.spec_of(folder, "python", options=options)
    async with (
        hosted(spec, tmp_path / "s", zygotes, threads=3) as (host, loaded),
    ):
        assert loaded.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
        told = one(await host.infer(ask(X))).tolist()
        assert told == [b"m", b"cpu", b"1", b"1", b"1.5", b"h", b"s", b"True", b"l"]
    assert not list(folder.glob("__pycache__"))


@pytest.mark.parametrize("count", [4, 100_000])
async def test_an_input_is_read_only_whatever_its_size_and_wherever_the_model_runs(
    zygotes, tmp_path, count
):
    source = """
        class Model:
            def infer(self, inputs):
                inputs["x"] += 1
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    x = Tensor.of("x", np.zeros(count, np.float32))
    for where in (zygotes, None):
        async with hosted(spec, tmp_path / "s", where) as (host, _):
            text = await fails(lambda host=host: host.infer(ask(x)), InferenceFailedError)
            assert "read-only" in text


async def test_what_a_model_prints_goes_to_stderr(tmp_path, capfd):
    source = """
        print("while importing")
        class Model:
            def infer(self, inputs):
                print("while inferring")
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        await host.infer(ask(X))
    out, err = capfd.readouterr()
    assert out == ""
    assert "while importing\n" in err and "while inferring\n" in err


async def test_unload_is_called_when_the_model_is_stopped(zygotes, tmp_path):
    note = tmp_path / "unloaded"
    source = f"""
        import pathlib
        class Model:
            def infer(self, inputs):
                return inputs
            def unload(self):
                pathlib.Path({str(note)!r}).write_text("yes")
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with hosted(spec, tmp_path / "s", zygotes):
        pass
    assert note.read_text() == "yes"


async def test_a_model_raising_says_what_and_where_without_a_path(zygotes, tmp_path):
    source = """
        class Model:
            def infer(self, inputs):
                open(__file__ + ".missing")
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        text = await fails(lambda: host.infer(ask(X)), InferenceFailedError)
    assert text == "FileNotFoundError: [Errno 2] No such file or directory: 'model.py.missing'"


@pytest.mark.parametrize(
    ("returns", "text"),
    [
        ("None", "must return a dict of numpy arrays; it returned a NoneType"),
        ("[1]", "it returned a list"),
        ("{'y': [1, 2]}", "'y' is a list"),
        ("{'y': 1.0}", "'y' is a float"),
        ("{1: np.zeros(1)}", "'1' is a numpy.ndarray"),
        ("{'y': np.array([1, None], dtype=object)}", "holds an int; only bytes and str"),
        ("{'y': np.zeros(1, complex)}", "no KServe V2 datatype"),
    ],
)
async def test_what_is_wrong_with_an_answer_is_named(zygotes, tmp_path, returns, text):
    assert text in await answers_with(zygotes, tmp_path, returns)


async def test_an_answer_is_checked_against_what_was_declared(zygotes, tmp_path):
    declared = (TensorConfig(name="y", datatype="FP32", shape=(4,)),)
    text = await answers_with(zygotes, tmp_path, "{'z': np.zeros(1)}", outputs=declared)
    assert text == "infer() returned no 'y'; it returned 'z'"
    text = await answers_with(zygotes, tmp_path, "{'y': np.zeros(4)}", outputs=declared)
    assert text == "infer() returned 'y' as FP64 (float64); it is declared as FP32"
    text = await answers_with(
        zygotes, tmp_path, "{'y': np.zeros((3, 4), np.float32)}", outputs=declared, max_batch_size=8
    )
    assert text == "infer() returned 'y' with shape [3, 4] for a batch of 2"


async def test_requests_that_do_not_fit_are_the_clients_fault(zygotes, tmp_path):
    declared = {
        "inputs": (TensorConfig(name="x", datatype="FP32", shape=(-1, 4)),),
        "outputs": (TensorConfig(name="x", datatype="FP32", shape=(-1, 4)),),
    }
    spec = models.spec_of(models.python_model(tmp_path / "m/1", ECHO), "python", **declared)
    cases = {
        "no input 'z'": ask(Tensor.of("z", np.zeros(1))),
        "is FP64; the model wants FP32": ask(Tensor.of("x", np.zeros(1))),
        "no output 'q'": ask(X, outputs=("q",)),
    }
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        for text, request in cases.items():
            with pytest.raises(InvalidTensorError, match=text):
                await host.infer(request)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ValueError('not today')", "ValueError: not today"),
        ("x = (", "SyntaxError"),
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("import triton_python_backend_utils", "set backend to triton_python, or leave it out"),
        ("def Model(): ...", "model.py has no class 'Model'; write one, or set options.class"),
        ("class Model: ...", "has no method infer(self, inputs)"),
        ("class Model:\n    infer = print\n    inputs = ['x']", "must be (name, datatype, shape)"),
        ("class Model:\n    infer = print\n    inputs = [('x', 'F', ())]", "'F' of 'x' is no data"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
    ],
)
async def test_why_a_model_does_not_load_is_said(zygotes, tmp_path, source, text):
    assert text in await refused(zygotes, tmp_path, source)


async def test_a_folder_without_model_py_and_an_unknown_option_are_refused(zygotes, tmp_path):
    text = await refused(zygotes, tmp_path, ECHO, options={"clas": "Model"})
    assert text == "options.clas: backend 'python' does not know it; did you mean 'class'?"
    folder = tmp_path / "empty/1"
    folder.mkdir(parents=True)
    spec = models.spec_of(folder, "python")
    host = make(spec, tmp_path / "s", zygotes)
    text = await fails(lambda: host.load(spec, ["cpu"]), IncompleteFilesError)
    assert text == "model.py is missing"
    await host.stop(5.0)


async def test_overwriting_the_folder_does_not_reach_a_live_model(zygotes, tmp_path):
    source = """
        import pathlib
        import numpy as np
        class Model:
            def load(self, context):
                self.folder = context.folder
            def infer(self, inputs):
                import late
                return {"y": np.array([(self.folder / "data.txt").read_text() + late.WORD])}
    """
    folder = models.python_model(tmp_path / "m/1", source, late="WORD = 'old'")
    (folder / "data.txt").write_text("old")
    spec = models.spec_of(folder, "python")
    async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
        (folder / "data.txt").write_text("new")
        (folder / "late.py").write_text("WORD = 'new'")
        assert one(await host.infer(ask())).tolist() == [b"oldold"]


async def test_a_link_out_of_the_folder_is_refused(zygotes, tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = models.python_model(tmp_path / "m/1", ECHO)
    os.symlink(tmp_path / "secret", folder / "data.txt")
    assert "'data.txt' links to a file outside" in await refused(zygotes, tmp_path, ECHO)
