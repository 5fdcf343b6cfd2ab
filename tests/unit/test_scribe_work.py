"""A scribe says what the codecs say, word for word; only how the bytes travel differs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repository.errors import InferenceFailedError, InvalidRequestError, RepositoryError
from repository.messages import InferResponse
from repository.tensors import DATATYPES, Buffer, Tensor
from server.codecs import v2_binary, v2_json, v2_plan
from server.codecs.v2_plan import Plan
from server.errors import ServerError, text_of
from server.scribes import child, sheets
from server.scribes.pool import Pool
from server.scribes.scribes import Scribes
from server.scribes.sheets import Sheet
from tests.fakes.bodies import body, tensor


class Here(Pool):
    """A scribe's work, done on the spot. `sent`: bytes of the last job."""

    sent = 0

    async def ask(
        self, kind: str, told: bytes, parts: Sequence[Buffer | int], size: int
    ) -> tuple[str, Sheet]:
        self.sent = sum(len(part) for part in parts if not isinstance(part, int))
        job = Sheet(sheets.write(told, parts), len(told))
        kind, told, found = child.work(kind, job)
        return kind, Sheet(sheets.write(told, found), len(told))


HERE = Here(1)
SCRIBES = Scribes(HERE)


def plain(plan: Plan) -> Plan:
    """With bytes that can be compared."""
    pieces = [p._replace(data=None if p.data is None else bytes(p.data)) for p in plan.pieces]
    return plan._replace(pieces=tuple(pieces))


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (RepositoryError, ServerError) as error:
        return type(error), text_of(error)


def agree_on(text: bytes) -> Any:
    """What both make of a request."""
    there = outcome(lambda: plain(asyncio.run(SCRIBES.plan_of(text))))
    assert there == outcome(lambda: plain(v2_plan.plan_of(text)))
    return there


def agree_on_answer(plan: Plan, response: InferResponse) -> Any:
    def joined(encoded: v2_binary.Encoded) -> tuple[int | None, bytes, int]:
        return encoded.header_length, b"".join(encoded.buffers), encoded.total

    there = outcome(lambda: joined(asyncio.run(SCRIBES.encode(plan, response, "m", 3))))
    assert there == outcome(lambda: joined(v2_binary.encode(plan, response, "m", 3)))
    return there


texts = st.text(max_size=8)
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.floats(), texts,
    st.lists(st.integers(0, 5), max_size=3), st.dictionaries(texts, st.booleans(), max_size=2),
)  # fmt: skip
lists = st.one_of(
    st.lists(st.integers(-3, 300), max_size=8),
    st.lists(st.floats(), max_size=8),
    st.lists(st.booleans(), max_size=8),
    st.lists(texts, max_size=8),
    st.recursive(values, lambda inner: st.lists(inner, max_size=4), max_leaves=8),
)


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    data = draw(lists)
    sizes = st.just([len(data)]) if isinstance(data, list) else st.just([1])
    found = tensor(
        draw(st.sampled_from(["x", "y", "NaN", "ü\\"])),
        draw(st.one_of(sizes, st.lists(st.integers(-1, 4), max_size=3))),
        draw(st.sampled_from([*DATATYPES, "FP8"])),
        data,
    )
    if draw(st.booleans()) and draw(st.booleans()):
        found.pop("data", None)
        found["parameters"] = draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "binary_data_size": st.integers(-1, 9),
                    "shared_memory_region": texts,
                },
            )
        )
    return found


rests = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(texts, st.integers()),
        "parameters": st.dictionaries(st.sampled_from(["k", "timeout", "headers"]), values),
        "outputs": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["y", "z"])},
                optional={"parameters": st.fixed_dictionaries({"binary_data": st.booleans()})},
            ),
            max_size=3,
        ),
    },
)


@settings(deadline=None, max_examples=400)
@given(st.lists(inputs(), max_size=3), rests, st.booleans())
@example([tensor("x", [2], "FP32", [1e300, float("nan")])], {}, False)
@example([tensor("x", [1], "INT64", [10**30])], {"id": "1"}, False)
@example([tensor("x", [1], "BYTES", ["\ud800"])], {}, True)
def test_a_scribe_reads_as_the_codec_reads(
    found: list[dict[str, Any]], rest: dict[str, Any], escaped: bool
) -> None:
    text = json.dumps({"inputs": found, **rest}, ensure_ascii=escaped)
    agree_on(text.encode(errors="surrogatepass"))


HOSTILE = {
    "nothing": b"",
    "no json": b"inputs",
    "cut off": body(tensor("x", [9], "FP32", [1] * 9))[0][:-9],
    "deep": b'{"inputs":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep data": b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":'
    + b"[" * 10_000 + b"1" + b"]" * 10_000 + b"}]}",
    "a long number": b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":['
    + b"9" * 300_000 + b"]}]}",
    "a long integer": b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT64","data":['
    + b"9" * 300_000 + b"]}]}",
    "a long number and a NaN": b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[NaN,'
    + b"9" * 300_000 + b"]}]}",
    "many exponents": b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1e'
    + b"9" * 300_000 + b"]}]}",
    "not utf-8": b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\xff"]}]}',
    "one string of numbers": b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT8","data":"'
    + b"1," * 100_000 + b'"}]}',
    "half a surrogate": b'{"inputs":[],"id":"\\ud800","parameters":{"k":NaN}}',
    "a shape beyond all": b'{"inputs":[{"name":"x","shape":[99999999999],"datatype":"FP32",'
    b'"data":[1]}]}',
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_scribe_refuses_as_the_codec_refuses(what: str) -> None:
    kind, text = agree_on(HOSTILE[what])
    assert kind.__module__ in ("repository.errors", "server.refusals") and text


def test_a_long_text_in_an_error_is_cut_where_clients_do_not_see_it() -> None:
    _, text = agree_on(body(tensor("n" * 1_000_000, [1], "FP16", [1]))[0])
    assert text.startswith("receiving FP16") and text.endswith("n" * 400)


def test_every_datatype_is_read_and_written_by_a_scribe() -> None:
    for name, known in DATATYPES.items():
        data = (
            ["a", "ü", ""]
            if name == "BYTES"
            else [True, False, True]
            if name == "BOOL"
            else [1, 0, 7]
        )
        plan = agree_on(body(tensor("x", [3], name, data), id="7", parameters={"k": "v"})[0])
        if name in ("FP16", "BF16"):
            assert plan[0] is InvalidRequestError
            continue
        raw = plan.pieces[0].data
        assert known.size == 0 or len(raw) == 3 * known.size
        response = InferResponse([Tensor("y", name, (3,), raw)], {"p": 1.5})
        header_length, text, total = agree_on_answer(plan, response)
        assert header_length is None and total == len(text)
        assert json.loads(text)["outputs"][0]["data"] == data


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.sampled_from(["FP32", "FP64", "BOOL", "UINT8", "BYTES", "FP16"]),
            st.lists(st.floats(width=32), max_size=20),
        ),
        max_size=3,
    ),
    st.lists(st.sampled_from(["a", "b", "c"]), unique=True),
    st.sets(st.sampled_from(["a", "b", "c"])),
    st.booleans(),
)
def test_a_scribe_writes_as_the_codec_writes(
    given: list[tuple[str, str, list[float]]], asked: list[str], binary: set[str], rest: bool
) -> None:
    plan = Plan((), tuple(asked), frozenset(binary & set(asked)), rest, "id")
    outputs = []
    for name, datatype, data in given:
        with np.errstate(all="ignore"):
            array = np.array(data, "f4")
            kind = {"BYTES": "O", "FP16": "f2", "BOOL": "?", "UINT8": "u1", "FP64": "f8"}
            outputs.append(Tensor.of(name, array.astype(kind.get(datatype, "f4"))))
    agree_on_answer(plan, InferResponse(outputs, {"n": 1}))


def test_an_output_that_is_not_there_is_the_models_failure_in_a_scribe_too() -> None:
    kind, text = agree_on_answer(Plan((), ("y",)), InferResponse([]))
    assert kind is InferenceFailedError and "'y'" in text


def test_binary_outputs_are_not_sent_to_a_scribe() -> None:
    binary = {"binary_data": True}
    outputs = [
        {"name": "b", "parameters": binary},
        {"name": "j"},
        {"name": "none", "parameters": binary},
    ]
    plan = v2_plan.plan_of(body(tensor("x", [1], "FP32", [1]), outputs=outputs)[0])
    small, large = np.arange(1000, dtype="f4"), np.arange(50_000, dtype="f4")
    response = InferResponse(
        [
            Tensor.of("j", small),
            Tensor.of("b", large),
            Tensor.of("none", small[:0]),
            Tensor.of("unasked", small),
        ]
    )
    header_length, text, total = agree_on_answer(plan, response)
    assert text[header_length:] == large.tobytes() and total == len(text)
    assert HERE.sent == small.nbytes


@settings(deadline=None, max_examples=300)
@given(lists, st.sampled_from(["FP32", "INT8", "UINT64", "BOOL"]), st.integers(1, 9))
@example([[1], [], [2]], "INT8", 1)
@example("1,2,3", "INT8", 1)
@example([1.5, [2.5, float("inf")]], "FP32", 1)
def test_data_is_the_same_however_it_is_cut(data: Any, datatype: str, chunk: int) -> None:
    text = json.dumps(data)
    spaced = text.replace(",", " , ").replace("[", "[ ")
    for each in (text, spaced):
        header = b'{"inputs":[{"name":"x","shape":[3],"datatype":"%b","data":%b}]}' % (
            datatype.encode(),
            each.encode(errors="surrogatepass"),
        )
        whole = outcome(lambda header=header: plain(v2_plan.plan_of(header)))
        kept = v2_json._CHUNK
        v2_json._CHUNK = chunk
        try:
            assert outcome(lambda header=header: plain(v2_plan.plan_of(header))) == whole
        finally:
            v2_json._CHUNK = kept


@pytest.mark.parametrize(
    "length", [v2_json._ELEMENTS - 1, v2_json._ELEMENTS, 3 * v2_json._ELEMENTS + 1]
)
@pytest.mark.parametrize("odd", [(), (0,), (-1,), (1, 2, 9000)])
def test_numbers_are_written_the_same_however_many_they_are(
    length: int, odd: tuple[int, ...]
) -> None:
    array = np.arange(length, dtype="f8") / 3
    for at, value in zip(odd, (np.nan, np.inf, -np.inf), strict=False):
        array[at % length] = value
    found = json.loads(bytes(v2_json.to_json(Tensor.of("y", array))))
    assert np.array_equal(found, array, equal_nan=True)
