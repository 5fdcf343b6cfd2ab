"""The text backend: a Hugging Face folder of a causal language model, written by through slots.

Options: `dtype` (auto, float32, bfloat16, float16), `slots` (sequences that run at once), `max_len`
(tokens of prompt and answer together), `prefill_chunk` (prompt tokens a step), `engine` (auto: slots
where the model proves that it can; slots, generate: that one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends import registry, torch_io
from repository.backends.abilities import Told
from repository.backends.asleep import SCRATCH, Movable, Tensors, tensors_of
from repository.backends.base import Order
from repository.backends.ferry import movable
from repository.backends.lora.adapters import LoraAdapters
from repository.backends.text import folder, proof, sampling
from repository.backends.text.cache import SlotCache
from repository.backends.text.desk import Desk
from repository.backends.text.engine import SlotsEngine
from repository.backends.text.fallback import GenerateEngine
from repository.backends.text.prompts import Prompts
from repository.backends.text.sequence import Writing
from repository.errors import InvalidRequestError, LoadFailedError
from repository.generate import GenerateRequest
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded

NAME = "text"
SLOTS, MAX_LEN, CHUNK = 8, 4096, 256
SHORTEST = 8  # tokens that a model must hold: the proof needs them
ENGINES = ("auto", "slots", "generate")


@dataclass(frozen=True, slots=True)
class Options:
    dtype: str
    engine: str
    slots: int
    chunk: int
    max_len: int  # 0: as the model says, at most MAX_LEN


def read_options(said: dict[str, Any]) -> Options:
    """Raises LoadFailedError."""
    registry.check_options(NAME, said)
    read = registry.option
    options = Options(
        dtype=read(said, "dtype", str, "auto"),
        engine=read(said, "engine", str, "auto"),
        slots=read(said, "slots", int, SLOTS),
        chunk=read(said, "prefill_chunk", int, CHUNK),
        max_len=read(said, "max_len", int, 0),
    )
    if options.engine not in ENGINES:
        raise LoadFailedError(
            f"options.engine is {options.engine!r}; it must be one of {', '.join(ENGINES)}"
        )
    for name, value in (("slots", options.slots), ("prefill_chunk", options.chunk)):
        if value < 1:
            raise LoadFailedError(f"options.{name} is {value}; it must be 1 or more")
    if "max_len" in said and options.max_len < SHORTEST:
        raise LoadFailedError(
            f"options.max_len is {options.max_len}; it must be {SHORTEST} or more"
        )
    return options


class TextBackend:
    """Fulfils all of `backends.abilities`."""

    def __init__(self) -> None:
        self._prompts: Prompts | None = None
        self._desk: Desk | None = None
        self._engine: SlotsEngine | GenerateEngine | None = None
        self._lora: LoraAdapters | None = None
        self._model: Any = None
        self._movable: Movable | None = None
        self._ends: frozenset[int] = frozenset()
        self._max_len = self._vocab = 0

    def load(self, order: Order) -> Loaded:
        options = read_options(order.config.options)
        torch_io.begin(order)
        self._movable = movable(order.device, self._tensors)
        folder.be_quiet()
        said = folder.read_config(order.path)
        config = folder.model_config(order.path)  # before the tokenizer, which looks at it too
        tokenizer = folder.read_tokenizer(order.path)
        self._model = model = folder.read_model(order, said, config, options.dtype)
        width = proof.widths(model, order.device)
        self._vocab = min(width, model.get_input_embeddings().weight.shape[0])
        self._max_len = _max_len(model, options)
        ends = folder.ends_of(order.path, model.config)
        self._ends = frozenset(token for token in ends if token < self._vocab)
        self._prompts = Prompts(tokenizer, self._vocab, self._max_len)
        weights = folder.weight_bytes(model)
        if order.config.adapters.enabled:
            self._lora = LoraAdapters(model, order.config.adapters)
        self._desk = Desk(self._lora)
        self._engine, why = self._choose(model, options, order.device)
        config = model.config.get_text_config()
        details: dict[str, Any] = {
            "engine": self._engine.name,
            "slots": options.slots,
            "max_len": self._max_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocab": self._vocab,
            "layers": getattr(config, "num_hidden_layers", 0),
        }
        if why:
            details["why"] = why
        memory = {"weights": weights, "kv": self._engine.kv_bytes}
        if self._lora is not None:
            memory["adapters"] = self._lora.device_bytes
        return Loaded(
            platform=registry.entry(NAME).platform,
            memory=memory,
            details=details,
            abilities=self._abilities(),
        )

    def _abilities(self) -> tuple[str, ...]:
        chat = self._prompts is not None and self._prompts.chat
        can = {"generate": True, "chat": chat, "adapt": self._lora is not None, "sleep": True}
        return tuple(name for name, does in can.items() if does)

    def _choose(
        self, model: Any, options: Options, device: str
    ) -> tuple[SlotsEngine | GenerateEngine, str]:
        """The engine, and why it is not the slots engine where that was not asked for."""
        assert self._desk is not None
        if options.engine != "generate":
            try:
                return self._slots(model, options, device), ""
            except proof.NotPlainError as error:
                if options.engine == "slots":
                    raise LoadFailedError(
                        f"options.engine is slots, which cannot run this model: {error}"
                    ) from error
                why = str(error)
        else:
            why = "options.engine asks for it"
        engine = GenerateEngine(
            model, self._desk, seats=options.slots, vocab=self._vocab, device=device
        )
        return engine, why

    def _slots(self, model: Any, options: Options, device: str) -> SlotsEngine:
        """Raises proof.NotPlainError."""
        assert self._desk is not None
        shapes = proof.shapes(model, self._max_len, device)
        small = SlotCache(shapes, 2, SHORTEST, dtype=model.dtype, device=device)
        proof.prove(proof.runner(model, small, device), self._vocab)
        cache = SlotCache(shapes, options.slots, self._max_len, dtype=model.dtype, device=device)
        run = proof.runner(model, cache, device)
        return SlotsEngine(run, self._desk, chunk=options.chunk, vocab=self._vocab)

    def infer(self, request: InferRequest) -> InferResponse:
        raise InvalidRequestError(
            "this model writes text: ask it by /v1/completions or /v1/chat/completions"
        )

    @property
    def unfinished(self) -> int:
        return self._desk.unfinished if self._desk is not None else 0

    def begin(self, number: int, request: GenerateRequest) -> None:
        assert self._desk is not None
        assert self._prompts is not None
        if self._movable is not None and self._movable.sleeping:
            raise InvalidRequestError("the model sleeps")
        sampling.check(request.sampling, self._vocab)
        if request.adapter:
            self._known(request.adapter)
        self._desk.begin(
            Writing(number, request, self._prompts, ends=self._ends, max_len=self._max_len)
        )

    def _known(self, adapter: str) -> None:
        if self._lora is None:
            raise InvalidRequestError("this model takes no adapters: its config switches them off")
        self._lora.check(adapter)

    def cancel(self, number: int) -> None:
        if self._desk is not None:
            self._desk.cancel(number)

    def step(self) -> Sequence[Told]:
        assert self._engine is not None
        return self._engine.step()

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        if self._lora is None:
            why = "this model takes no adapters: its config switches them off"
            return [AdapterReport(name=order.name, error=why) for order in orders]
        return self._lora.adapt(orders)

    def validate(self, order: Order) -> None:
        """Everything but the numbers: config, tokenizer, and each weight's name and shape."""
        options = read_options(order.config.options)
        folder.be_quiet()
        said = folder.read_config(order.path)
        config = folder.model_config(order.path)
        folder.read_tokenizer(order.path)
        folder.check_model(order, said, config, options.dtype)

    def sleep(self) -> None:
        assert self._movable is not None, "load comes first"
        if self._engine is not None:
            self._engine.rest()
        self._movable.sleep()

    def wake(self) -> None:
        assert self._movable is not None, "load comes first"
        self._movable.wake()

    def memory(self) -> Memory:
        return self._movable.memory() if self._movable is not None else {}

    def _tensors(self) -> Tensors:
        found: dict[str, Iterable[torch.Tensor]] = {}
        if self._model is not None:
            found["weights"] = tensors_of(self._model)
        if self._engine is not None:
            found[SCRATCH] = self._engine.kv
        if self._lora is not None:
            found["adapters"] = self._lora.tensors()
        return found

    def unload(self) -> None:
        self._movable = self._model = None
        if self._engine is not None:
            self._engine.close()
        self._engine = self._desk = self._prompts = self._lora = None


def _max_len(model: Any, options: Options) -> int:
    """Raises LoadFailedError."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = own if isinstance(own, int) and own > 0 else None
    if options.max_len:
        if positions is not None and options.max_len > positions:
            raise LoadFailedError(
                f"options.max_len is {options.max_len}; the model has {positions} positions"
            )
        return options.max_len
    return min(positions or MAX_LEN, MAX_LEN)
