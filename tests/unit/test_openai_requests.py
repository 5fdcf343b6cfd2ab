"""What OpenAI's requests may hold: every documented field is known, and nothing else gets far."""

from __future__ import annotations

import json
import time
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types import embedding_create_params as embedding_params
from openai.types.chat import completion_create_params as chat_params

from repository.errors import InvalidRequestError
from repository.generate import GenerateRequest
from server.codecs import openai_embeddings, openai_text
from server.codecs.openai_fields import FieldError
from server.codecs.openai_text import ANYWAY, Asked, ChatRequest, CompletionRequest

HI = [{"role": "user", "content": "hi"}]


def chat(**more: Any) -> Asked:
    return openai_text.chat(json.dumps({"model": "m", "messages": HI, **more}).encode())


def completion(**more: Any) -> Asked:
    return openai_text.completion(json.dumps({"model": "m", "prompt": "p", **more}).encode())


def refused(ask: Any, **more: Any) -> FieldError:
    with pytest.raises(FieldError) as raised:
        ask(**more)
    return raised.value


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ChatRequest, chat_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, completion_params.CompletionCreateParamsNonStreaming),
        (openai_embeddings.EmbeddingRequest, embedding_params.EmbeddingCreateParams),
    ],
)
def test_every_field_that_the_client_can_send_is_known(kind: Any, params: Any) -> None:
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    assert set(get_type_hints(params)) - known == set()


def test_what_is_refused_is_taken_where_it_asks_for_what_happens_anyway() -> None:
    chats = {f.encode_name for f in msgspec.structs.fields(ChatRequest)}
    for name, (anyway, _) in ANYWAY.items():
        ask = chat if name in chats else completion
        for value in (*anyway, None):
            ask(**{name: value})
        for value in ({"x": 1}, "auto", [{"type": "function"}]):
            error = refused(ask, **{name: value})
            assert error.param == name and name in str(error)


def test_a_harmless_field_is_taken_and_changes_nothing() -> None:
    harmless = {
        "user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": True, "prompt_cache_key": "k", "safety_identifier": "s",
        "prediction": {"type": "content", "content": "x"}, "temperature": None, "stop": None,
        "n": None, "stream": None, "logit_bias": None, "max_tokens": None,
    }  # fmt: skip
    assert chat(**harmless) == chat()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, "1", True]),
        ("top_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("n", [0, 17, 1.5, "2"]),
        ("max_tokens", [0, -1, 2**31]),
        ("seed", [2**63, "x"]),
        ("stop", [[""], "", ["x"] * 17, [1], "x" * 2000]),
        ("logit_bias", [{"x": 1}, {"-1": 1}, {"1": 101}, {"1": "1"}, {"٣": 1}, [1]]),
        ("stream_options", [{"include_usage": True}, {"x": 1}]),
        ("top_k", [-2]),
        ("min_p", [1.0, -0.1]),
        ("repetition_penalty", [0, -1, 1e-60, 101]),
        ("min_tokens", [-1]),
        ("stop_token_ids", [[-1], ["a"]]),
        ("adapters", [["a", "b"], 3]),
        ("echo", ["yes"]),
        ("best_of", [2, 0]),
        ("suffix", ["x"]),
        ("logprobs", [-1, 6]),
        ("prompt", [None, [], ["a", 1], [[1], "a"], [[]], [-1], [2**31], [["a"]], 3]),
        ("model", [None, 3]),
    ],
)
def test_a_field_out_of_its_bounds_is_named(field: str, values: list[Any]) -> None:
    for value in values:
        error = refused(completion, **{field: value})
        assert error.param.startswith(field), (value, error.param)
        assert field in str(error) and "$" not in str(error)


def test_fields_that_contradict_each_other_are_named() -> None:
    assert refused(chat, top_logprobs=2).param == "top_logprobs"
    assert refused(chat, max_tokens=1, max_completion_tokens=2).param == "max_tokens"
    assert refused(completion, max_tokens=2, min_tokens=3).param == "min_tokens"
    assert refused(completion, adapter="a", adapters=["b"]).param == "adapters"
    assert refused(completion, prompt=["p"] * 100, n=3).param == "n"
    assert chat(max_tokens=2, max_completion_tokens=2).sequences[0].sampling.max_tokens == 2


def test_a_message_that_no_model_here_can_read_is_named() -> None:
    def say(**message: Any) -> str:
        return refused(chat, messages=[*HI, message]).param

    assert say(role="robot", content="x") == "messages[1].role"
    assert say(role="tool", content="x", tool_call_id="1") == "messages[1].tool_call_id"
    assert say(role="tool", content="x") == "messages[1].role"
    assert say(role="assistant", tool_calls=[{}]) == "messages[1].tool_calls"
    assert say(role="user") == "messages[1].content"
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    assert say(role="user", content=[picture]) == "messages[1].content[0].type"
    assert say(role="user", content="x", colour="red") == "messages[1].colour"
    assert refused(chat, messages=[]).param == "messages"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    given = {
        "role": "assistant", "content": "hello", "refusal": None, "tool_calls": None,
        "function_call": None, "annotations": [], "audio": None,
    }  # fmt: skip
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[given, {"role": "user", "content": parts, "name": "me"}])
    assert asked.sequences[0].messages == (
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "ab", "name": "me"},
    )


def test_a_field_that_is_there_twice_is_refused_and_a_word_in_a_text_is_not() -> None:
    for body in (b'{"model":"m","prompt":"a","prompt" :"b"}', b'{"n":1,"n":1,"model":"m"}'):
        with pytest.raises(FieldError, match="twice"):
            openai_text.completion(body)
    tricky = 'say "model": or "prompt" : twice, \\"model\\": too'
    assert completion(prompt=tricky, user={"prompt": "x", "model": 1}).sequences[0].text == tricky


def test_what_is_handed_on_to_a_template_is_not_deep() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = {"x": [deep]}
    assert refused(chat, chat_template_kwargs=deep).param == "chat_template_kwargs"
    assert chat(chat_template_kwargs={"tools": [{"a": 1}]}).sequences[0].template


def test_a_body_of_values_without_number_is_refused_before_it_is_read() -> None:
    """However it is made, nobody else waits for it long."""
    many = 400_000
    for body in (
        b'{"model":"m","prompt":[' + b"[1]," * many + b"[1]]}",
        b'{"model":"m","messages":[' + b"{}," * many + b"{}]}",
        b"{" + b",".join(b'"k%06d":1' % i for i in range(many)) + b"}",
    ):
        for read in (openai_text.completion, openai_text.chat, openai_embeddings.embedding):
            began = time.process_time()
            with pytest.raises(InvalidRequestError):
                read(body)
            assert time.process_time() - began < 1.5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted(
    {f.encode_name for k in (ChatRequest, CompletionRequest) for f in msgspec.structs.fields(k)}
)
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, max_size=6)


@settings(max_examples=150, deadline=None)
@given(body=BODIES)
def test_any_json_is_a_request_that_can_be_sent_on_or_refused(body: dict[str, Any]) -> None:
    """Over well-formed defaults, so that the odd field is what counts."""
    for read, base in (
        (openai_text.chat, {"model": "m", "messages": HI}),
        (openai_text.completion, {"model": "m", "prompt": "p"}),
    ):
        raw = json.dumps({**base, **body}).encode()
        try:
            asked = read(raw)
        except InvalidRequestError:
            continue
        for one in asked.sequences:
            sent = msgspec.msgpack.encode(one)
            assert msgspec.msgpack.decode(sent, type=GenerateRequest) == one


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_refused_by_name(raw: bytes) -> None:
    for read in (openai_text.chat, openai_text.completion, openai_embeddings.embedding):
        with pytest.raises(InvalidRequestError):
            read(raw)
