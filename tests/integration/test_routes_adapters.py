"""Adapters that a request names in its body, its address or a header: on both routes the same, the later
wins, and what is remembered of one request says nothing of the next."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from server.scribes.scribes import LARGE_JSON
from tests.routes import CLOSE, answers_in, asking, both, in_uvloop, same, tensor
from tests.wire import post

NAMED = "/v2/models/named/infer"
LENGTH = "Inference-Header-Content-Length"
SAGEMAKER = "X-Amzn-SageMaker-Adapter-Identifier"
LISTED = ["a1", "", "a2"]


def as_json(query: str = "", *headers: str, rows: int = 3, pad: int = 0, **body: Any) -> bytes:
    said = json.dumps(asking(*range(2 * rows), **body)).encode()
    return post(NAMED + query, b" " * pad + said, *headers)


def as_bytes(query: str = "", *headers: str, **body: Any) -> bytes:
    x = tensor(1, 2, parameters={"binary_data_size": 8})
    del x["data"]
    head = json.dumps({"inputs": [x], **body}).encode()
    return post(NAMED + query, head + struct.pack("<2f", 1, 2), f"{LENGTH}: {len(head)}", *headers)


def raw(query: str = "", *headers: str) -> bytes:
    return post(NAMED + query, struct.pack("<2f", 1, 2), f"{LENGTH}: 0", *headers)


def parameters(heard: bytes) -> list[Any]:
    """That the model saw; of an error its text."""
    found = []
    for answer in answers_in(heard):
        length = answer.headers.get(LENGTH.lower())
        body = json.loads(answer.body[: int(length)] if length else answer.body)
        found.append(body.get("parameters", {}) if answer.status == 200 else body["error"])
    return found


ONE, EACH = {"adapter": "p"}, {"adapters": '["p", "", ""]'}
# what is asked -> what the model sees
WAYS: list[tuple[bytes, Any]] = [
    (as_json(), {}),
    (as_json(adapters="b"), {"adapter": "b"}),
    (as_json(adapters=""), {}),
    (as_json(adapters=LISTED), {"adapters": LISTED}),
    (as_json(adapters=[]), {}),
    (as_json(parameters=ONE), ONE),
    (as_json(parameters={**ONE, "k": 1}, adapters="b"), {"k": 1, "adapter": "b"}),
    (as_json(parameters={**ONE, "k": 1}, adapters=""), {"k": 1}),
    (as_json(parameters=EACH, adapters=LISTED), {"adapters": LISTED}),
    (as_json("?adapter=q", parameters=EACH, adapters=LISTED), {"adapter": "q"}),
    (as_json("?adapter=q", f"{SAGEMAKER}: h", adapters="b"), {"adapter": "h"}),
    (as_json("", f"{SAGEMAKER}: h", adapters=LISTED), {"adapter": "h"}),
    (as_json("?adapter=", f"{SAGEMAKER}:", adapters="b"), {"adapter": "b"}),
    (as_json("?adapter=q&x=1&adapter=r%2Bs"), {"adapter": "r+s"}),
    (as_json("?x=1&adapter"), {}),
    (as_json("", f"{SAGEMAKER}: h", f"{SAGEMAKER}: i"), {"adapter": "i"}),
    (as_bytes(adapters="b"), {"adapter": "b"}),
    (as_bytes("?adapter=q", adapters="b"), {"adapter": "q"}),
    (as_bytes("", f"{SAGEMAKER}: {'h' * 5000}"), {"adapter": "h" * 5000}),
    (raw(), {}),
    (raw("?adapter=q"), {"adapter": "q"}),
    (raw("?adapter=q", f"{SAGEMAKER}: h"), {"adapter": "h"}),
    (as_json(pad=LARGE_JSON, adapters=LISTED), {"adapters": LISTED}),
    (as_json("?adapter=q", pad=LARGE_JSON, adapters=LISTED), {"adapter": "q"}),
    (as_json("", f"{SAGEMAKER}: h", pad=LARGE_JSON), {"adapter": "h"}),
]  # fmt: skip
WRONG: list[tuple[Any, str]] = [
    (7, "Expected `str | array`"),
    (None, "Expected `str | array`"),
    ({"x": "a1"}, "Expected `str | array`"),
    (["a1", None, "a2"], "Expected `str`"),
]


@in_uvloop
async def test_the_later_wins_of_parameters_body_address_and_header() -> None:
    async with both() as depots:
        for raw, seen in WAYS:
            heard = await same(depots, [raw, as_json("", CLOSE)])
            assert parameters(heard) == [seen, {}], raw[:600]


@pytest.mark.parametrize("pad", [0, LARGE_JSON])
@in_uvloop
async def test_what_is_no_name_and_no_list_of_names_is_refused(pad: int) -> None:
    async with both() as depots:
        for said, why in WRONG:
            heard = await same(depots, as_json("", CLOSE, pad=pad, adapters=said))
            (answer,) = answers_in(heard)
            assert answer.status == 400 and why in answer.text and "adapters" in answer.text


@in_uvloop
async def test_a_head_and_a_header_that_are_known_name_their_own_adapter_and_no_other() -> None:
    """The same JSON in front of the same bytes, under heads that name one adapter, another, or none."""
    heads = [
        as_bytes(),
        as_bytes("?adapter=q"),
        as_bytes("", f"{SAGEMAKER}: h"),
        as_bytes("?adapter=r"),
    ]
    seen: list[Any] = [{}, {"adapter": "q"}, {"adapter": "h"}, {"adapter": "r"}]
    order = [0, 0, 0, 1, 1, 1, 0, 2, 2, 0, 3, 1, 3, 3, 2, 0]
    async with both() as depots:
        heard = await same(depots, [*[heads[i] for i in order], as_bytes("", CLOSE)])
        assert parameters(heard) == [*[seen[i] for i in order], {}]


@in_uvloop
async def test_text_with_a_nan_in_it_names_adapters_too_and_half_a_character_is_none() -> None:
    good = as_json("", CLOSE, adapters=LISTED).replace(b" 5]", b" NaN]")
    body = good.partition(b"\r\n\r\n")[2]
    async with both() as depots:
        assert parameters(await same(depots, post(NAMED, body, CLOSE))) == [{"adapters": LISTED}]
        half = body.replace(b'"a2"', b'"\\ud800"')
        (why,) = parameters(await same(depots, post(NAMED, half, CLOSE)))
        assert "surrogate" in why
