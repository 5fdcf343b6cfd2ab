"""Sequences with different adapters write in one batch, each as PEFT's own model would alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from repository.adapters.orders import AdapterOrder
from repository.backends.base import Order
from repository.backends.text.backend import TextBackend
from repository.config import Adapters, ModelConfig
from repository.errors import AdapterNotFoundError
from repository.generate import GenerateRequest, Sampling
from tests import lora, tiny
from tests.integration.test_text_engine import plainly
from tests.writers import Writer

PROMPTS = [[(5 + 7 * i + 3 * j) % 400 for j in range(3 + 13 * i)] for i in range(5)]
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_text_model(tmp_path_factory.mktemp("llama"), "llama")
    for seed, name in enumerate(NAMES):
        tiny.write_adapter(folder / name, tiny.model_of("llama"), seed=seed)
    return folder


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, list[list[int]]]:
    """What each adapter's own model writes."""
    from peft import PeftModel

    found = {"": [plainly(tiny.model_of("llama"), prompt, 20) for prompt in PROMPTS]}
    for name in NAMES:
        with warnings.catch_warnings():  # PEFT asks transformers by a name that has grown old
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            model: Any = PeftModel.from_pretrained(tiny.model_of("llama"), folder / name).eval()
        found[name] = [plainly(model.merge_and_unload(), prompt, 20) for prompt in PROMPTS]
    return found


def adapted(folder: Path, engine: str, slots: int) -> Writer:
    config = ModelConfig(
        adapters=Adapters(slots=slots),
        options={"slots": 3, "prefill_chunk": 16, "engine": engine},
    )
    backend = TextBackend()
    loaded = backend.load(Order(model="m", version=1, path=folder, model_file="", config=config))
    return Writer(backend, loaded)


def request(prompt: list[int], adapter: str) -> GenerateRequest:
    settings = Sampling(temperature=0, max_tokens=20, ignore_eos=True)
    return GenerateRequest(tokens=tuple(prompt), sampling=settings, adapter=adapter)


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_different_adapters_share_a_batch_and_write_what_they_write_alone(
    engine: str, folder: Path, wanted: dict[str, list[list[int]]]
) -> None:
    writer = adapted(folder, engine, slots=2)  # fewer than adapters: they take turns
    assert "adapt" in writer.loaded.abilities
    orders = [lora.order(folder / name, name) for name in NAMES]
    assert [report.error for report in writer.backend.adapt(orders)] == [""] * 3
    order = ["a", "", "b", "c", "a"]
    answers = writer.write(*[request(p, name) for p, name in zip(PROMPTS, order, strict=True)])
    for i, name in enumerate(order):
        assert answers[i].tokens == wanted[name][i]
    assert len({tuple(wanted[name][1]) for name in ("", *NAMES)}) == 4
    writer.backend.unload()


def test_a_sequence_waits_for_an_adapter_slot_and_others_pass_it(
    folder: Path, wanted: dict[str, list[list[int]]]
) -> None:
    writer = adapted(folder, "slots", slots=1)
    writer.backend.adapt([lora.order(folder / name, name) for name in NAMES])
    for number, name in enumerate(("a", "b", "", "a")):
        writer.begin(number, request(PROMPTS[0], name))
    writer.step()
    assert [bool(writer.answers[n].pieces) for n in range(4)] == [True, False, True, True]
    writer.backend.cancel(0)
    writer.step()
    assert not writer.answers[1].pieces  # the other one still has it
    writer.backend.cancel(3)
    writer.step()
    assert writer.answers[1].pieces
    writer.finish()
    assert writer.answers[1].tokens == wanted["b"][0]
    writer.backend.unload()


def test_an_adapter_that_others_keep_out_of_its_slot_gets_its_turn(folder: Path) -> None:
    writer = adapted(folder, "slots", slots=1)
    writer.backend.adapt([lora.order(folder / name, name) for name in NAMES])
    for number, name in enumerate(("a", "b")):
        writer.begin(number, request(PROMPTS[0], name))
    for number in range(2, 100):  # every few steps somebody wants the one that is there
        for _ in range(8):
            writer.step()
        if writer.answers[1].pieces:
            break
        writer.begin(number, request(PROMPTS[0], "a"))
    assert writer.answers[1].pieces, "it waits for ever"
    writer.finish()
    assert all(answer.ended for answer in writer.answers.values())
    writer.backend.unload()


def test_an_adapter_that_is_removed_is_not_found_and_who_runs_keeps_it(
    folder: Path, wanted: dict[str, list[list[int]]]
) -> None:
    writer = adapted(folder, "slots", slots=2)
    with pytest.raises(AdapterNotFoundError, match="a has not been registered"):
        writer.begin(0, request(PROMPTS[0], "a"))
    writer.backend.adapt([lora.order(folder / name, name) for name in NAMES])
    for number, name in enumerate(("a", "b", "c")):
        writer.begin(number, request(PROMPTS[1], name))
    writer.step()
    writer.backend.adapt([AdapterOrder(name=name, remove=True) for name in NAMES])
    writer.finish()
    assert writer.answers[0].tokens == wanted["a"][1]
    assert isinstance(writer.answers[2].error, AdapterNotFoundError)  # it was still waiting
    assert writer.backend.unfinished == 0
    writer.backend.unload()
