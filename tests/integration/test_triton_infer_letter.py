"""Triton's infer, to the letter: each row of the table is a request that is refused, and how, on both
routes alike."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.letters import (
    LENGTH,
    MAX_BODY,
    ROW,
    SIXTEEN,
    ZEROS,
    Pair,
    asking,
    binary,
    numbers,
    one,
    paired,
    simple,
    sized,
    tensor,
)

ID = "[request id: <id_unknown>] "


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with paired() as pair:
        yield pair


class Refused(NamedTuple):
    model: str
    body: bytes
    headers: tuple[str, ...]
    status: int
    text: str  # what its text begins with


def refused(model: str, body: bytes, status: int, text: str, *headers: str) -> Refused:
    return Refused(model, body, headers, status, text)


WHOLE, COUNT = binary(SIXTEEN, SIXTEEN)
LONGER, LONGER_COUNT = binary(SIXTEEN, SIXTEEN + b"more")
LONE = asking(tensor("INPUT0", (1, 16), "INT32", data=ROW))
REFUSED: dict[str, Refused] = {
    # the form of a request
    "no source": refused(
        "floats", asking({"name": "x", "shape": [1, 1], "datatype": "FP32"}), 400,
        "Input must set only one of the following fields: ",
    ),
    "two sources": refused(
        "floats", asking({**tensor(**sized(16)), "data": [1]}), 400,
        "Input must set only one of the following fields: ",
    ),
    "bytes left over": refused(
        "simple", WHOLE + b"x", 400, "unexpected additional input data for model 'simple'", COUNT
    ),
    "bytes missing": refused(
        "simple", WHOLE[:-3], 400,
        "unexpected size for input 'INPUT1', expecting 3 additional bytes for model 'simple'", COUNT,
    ),
    "a length beyond the body": refused("floats", b"{}", 400, LENGTH, f"{LENGTH}: 3"),
    "a length that is none": refused("floats", b"{}", 400, LENGTH, f"{LENGTH}: two"),
    "a length below zero": refused("floats", b"{}", 400, LENGTH, f"{LENGTH}: -1"),
    "an output twice": refused(
        "simple", simple(outputs=[{"name": "OUTPUT0"}] * 2), 400,
        "output 'OUTPUT0' already exists in request",
    ),
    "nested too deeply": refused(
        "floats", one("FP32", "DATA").replace(b'"DATA"', b"[" * 101 + b"1" + b"]" * 101), 400,
        "the request's JSON is nested deeper than 100 levels"
    ),
    "no JSON": refused("floats", b"{", 400, "failed to parse the request JSON"),
    "larger than allowed": refused(
        "floats", b" " * (MAX_BODY + 1), 400,
        f"Request of {MAX_BODY + 1} bytes exceeds the maximum allowed input size of {MAX_BODY} bytes. "
        "Use --http-max-input-size to increase the limit.",
    ),
    # data in JSON
    "half floats": refused(
        "half", one("FP16", [1, 2], (2,)), 400,
        "receiving FP16 data via JSON is not supported. Please use the binary data format for input x",
    ),
    "brain floats": refused("bits", one("BF16", [1, 2], (2,)), 400, "receiving BF16 data via JSON"),
    "too few elements": refused(
        "floats", one("FP32", [1, 2, 3]), 500,
        "Failed to parse 'data' field: shape does not match true shape",
    ),
    "too many elements": refused(
        "floats", one("FP32", [1, 2, 3, 4, 5]), 500,
        "Unable to parse 'data': Shape does not match true shape of 'data' field",
    ),
    # parameters
    "a parameter of Triton's own": refused(
        "simple", simple(parameters={"triton_x": 1}), 400, "parameter 'triton_x' is reserved"
    ),
    "headers as a parameter": refused(
        "simple", simple(parameters={"headers": "x"}), 400, "parameter 'headers' is reserved"
    ),
    "a sequence below zero": refused(
        "simple", simple(parameters={"sequence_id": -1}), 400, "Unable to parse 'sequence_id'"
    ),
    "a start that is no bool": refused(
        "simple", simple(parameters={"sequence_start": 1}), 400, "Unable to parse 'sequence_start'"
    ),
    "a priority that is text": refused(
        "simple", simple(parameters={"priority": "high"}), 400, "Unable to parse 'priority'"
    ),
    # what the core says, with the request's id
    "an input missing": refused(
        "simple", LONE, 400,
        f"{ID}expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], but "
        "missing required input(s) ['INPUT1']. Please provide all required input(s).",
    ),
    "an input missing, with an id": refused(
        "simple", asking(tensor("INPUT0", (1, 16), "INT32", data=ROW), id="i7"), 400,
        "[request id: i7] expected 2 inputs but got 1 inputs for model 'simple'.",
    ),
    "too many rows": refused(
        "simple", asking(*numbers(9)), 400,
        f"{ID}inference request batch-size must be <= 8 for 'simple'",
    ),
    "another shape": refused(
        "simple", asking(*[{**t, "shape": [1, 15], "data": ROW[:15]} for t in numbers()]), 400,
        f"{ID}unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,15]. "
        "NOTE: Setting a non-zero max_batch_size",
    ),
    "another datatype": refused(
        "simple", asking(*[{**t, "datatype": "FP32"} for t in numbers()]), 400,
        f"{ID}inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'",
    ),
    "another size": refused(
        "simple", LONGER, 400,
        f"{ID}input byte size mismatch for input 'INPUT1' for model 'simple'. Expected 64, got 68",
        LONGER_COUNT,
    ),
    "an unknown input": refused(
        "floats", asking(tensor("z")), 400, "unexpected inference input 'z' for model 'floats'"
    ),
    "an unknown output": refused(
        "simple", simple(outputs=[{"name": "q"}]), 400,
        "unexpected inference output 'q' for model 'simple'",
    ),
    # models
    "a model that nobody knows": refused("nobody", simple(), 404, "Request for unknown model: 'nobody'"),
    "a decoupled model": refused(
        "many", asking(tensor(shape=(1,), data=[1])), 501,
        "HTTP end point doesn't support models with decoupled transaction policy",
    ),
    "a full queue": refused(
        "full", asking(tensor(shape=(1,), data=[1])), 503, "Exceeds maximum queue size"
    ),
    "a timeout": refused("late", asking(tensor(shape=(1,), data=[1])), 503, "Request timeout expired"),
    # raw
    "raw, for two inputs": refused(
        "simple", SIXTEEN, 400,
        f"{ID}Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'simple' "
        "model configuration", f"{LENGTH}: 0",
    ),
    "raw, with two open dimensions": refused(
        "floats", ZEROS, 400,
        f"{ID}The shape of the raw input 'x' can not be deduced because there are more than one "
        "variable-sized dimension", f"{LENGTH}: 0",
    ),
    "raw, with half an element": refused(
        "open", b"12345", 400, f"{ID}input byte size mismatch for input 'x' for model 'open'.",
        f"{LENGTH}: 0",
    ),
    # classes and shared memory
    "classes of texts": refused(
        "text",
        one("BYTES", ["a"], (1, 1), outputs=[{"name": "y", "parameters": {"classification": 1}}]), 400,
        "class result not available for output due to unsupported type 'BYTES'",
    ),
    "classes in shared memory": refused(
        "simple", simple(outputs=[{"name": "OUTPUT0", "parameters": {
            "classification": 1, "shared_memory_region": "r", "shared_memory_byte_size": 64}}]),
        400, "shared memory can not be used with classification",
    ),
    "an input in shared memory": refused(
        "floats", asking(tensor(parameters={
            "shared_memory_region": "r", "shared_memory_byte_size": 16})), 501,
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.",
    ),
    "an output in shared memory": refused(
        "simple", simple(outputs=[{"name": "OUTPUT0", "parameters": {
            "shared_memory_region": "r", "shared_memory_byte_size": 64}}]), 501,
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.",
    ),
    # compression
    "brotli": refused(
        "simple", simple(), 501, "Unsupported compression type", "Content-Encoding: br"
    ),
    "two codings": refused(
        "simple", simple(), 501, "Unsupported compression type", "Content-Encoding: gzip, deflate"
    ),
    "two codings in two headers": refused(
        "simple", simple(), 501, "Unsupported compression type", "Content-Encoding: gzip",
        "Content-Encoding: gzip",
    ),
    "not gzip at all": refused(
        "simple", simple(), 400, "the body cannot be decompressed", "Content-Encoding: gzip"
    ),
    "deflate without its wrapping": refused(
        "simple", zlib.compress(simple(), wbits=-15), 400, "the body cannot be decompressed",
        "Content-Encoding: deflate",
    ),
    "half of a stream": refused(
        "simple", gzip.compress(simple())[:-9], 400, "the compressed body ends too early",
        "Content-Encoding: gzip",
    ),
    "nothing compressed": refused(
        "simple", b"", 400, "the compressed body ends too early", "Content-Encoding: gzip"
    ),
    "more than a stream": refused(
        "simple", gzip.compress(simple()) + b"more", 400, "4 bytes follow the end",
        "Content-Encoding: gzip",
    ),
    "a bomb": refused(
        "simple", gzip.compress(bytes(MAX_BODY * 50)), 400,
        f"Request exceeds the maximum allowed input size of {MAX_BODY} bytes once it is decompressed. "
        "Use --http-max-input-size to increase the limit.", "Content-Encoding: gzip",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_a_bad_request_is_refused_in_tritons_words(pair: Pair, label: str) -> None:
    model, body, headers, status, text = REFUSED[label]
    answer = pair.ask(model, body, *headers)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.body.startswith(b'{"error":"'), (
        "Triton's own tests look for it so, without a blank"
    )
    assert answer.text.startswith(text), answer.text
    if status == 501 and headers:
        assert answer.headers["accept-encoding"] == "gzip, deflate"
    pair.quiet()


def test_more_than_65536_pieces_of_a_body_are_refused(pair: Pair) -> None:
    raw = b"POST /v2/models/floats/infer HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = pair.send([raw + b"1\r\n \r\n" * 65_537 + b"0\r\n\r\n"])
    assert (answer.status, "65536 tiny pieces" in answer.text) == (400, True)
