"""Models written for Triton's python backend: a `model.py` with the class `TritonPythonModel`, as it is.
Needs `trust_code`: it runs what is there.

    auto_complete_config(config)   static, optional: what its config file does not say
    initialize(args)               optional; `args` as Triton gives them, every value a text
    execute(requests)              see `running`
    is_ready()                     optional: what it says of itself
    finalize()                     optional

All of it runs on the worker's main thread; a model may begin threads of its own, and answer from them.
docs/triton-python.md says what of Triton's API there is, and what is different.
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

from repository.backends import registry, user_code
from repository.backends.abilities import Asked, Others
from repository.backends.base import Order
from repository.backends.device_use import DeviceUse
from repository.backends.triton import described, utils
from repository.backends.triton.auto_complete import ModelConfig
from repository.backends.triton.metrics import Book
from repository.backends.triton.outgoing import Outgoing
from repository.backends.triton.request import InferenceRequest
from repository.backends.triton.running import Running
from repository.backends.triton.sender import Mourner, Way
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    LoadFailedError,
    RepositoryError,
)
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded

NAME = "triton_python"
MODEL_FILE = "model.py"
CLASS = "TritonPythonModel"
UNLOADED = "the model was unloaded before it had sent its last response"


class TritonPythonBackend:
    def __init__(self) -> None:
        self._others: Others | None = None
        self._utils: ModuleType | None = None
        self._book = Book()
        self._module: ModuleType | None = None
        self._model: Any = None
        self._running: Running | None = None
        self._mourner = Mourner()
        self._ways: weakref.WeakSet[Way] = weakref.WeakSet()
        self._outgoing = Outgoing({}, _ignore)
        self._at = ("", 0)
        self._shared = ""  # as sys.path has it
        self._decoupled = False
        self._device = ""
        self._use: DeviceUse | None = None  # on a GPU

    def meet(self, others: Others) -> None:
        """As `abilities.Asks`."""
        self._others = others

    def load(self, order: Order) -> Loaded:
        registry.check_options(NAME, order.config.options)
        if order.extra.get("shares_process"):
            raise LoadFailedError(
                f"'{order.model}' is a model for Triton's python backend, which needs a process of its "
                "own; set host to process"
            )
        self._watch(order.device)
        verbose = bool(order.extra.get("log_verbose", 0))
        self._book = Book(self._others.show if self._others is not None else None)
        self._utils = utils.make(order.model, order.path, self._others, self._book, verbose=verbose)
        utils.install(self._utils)
        self._share(str(order.extra.get("folder", "")))
        self._module = user_code.load_file(
            order.path / (order.model_file or MODEL_FILE), private=False
        )
        kind = _class_of(self._module)
        config = self._complete(kind, order)
        inputs, outputs = described.specs(config, "input"), described.specs(config, "output")
        self._prepare(order, config)
        model = kind()
        if hasattr(model, "initialize"):
            model.initialize(described.arguments(order, json.dumps(config)))
        self._model = model  # `finalize` is for what has been initialized
        if self._use is not None:
            self._use.after(0, model=None)
        self._running = Running(model.execute, decoupled=self._decoupled)
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=config["max_batch_size"],
            platform=registry.entry(NAME).platform,
            details={"class": CLASS, "threads": order.threads, "triton_config": config},
            abilities=self._abilities(),
        )

    def validate(self, order: Order) -> None:
        """The file is read, not run: it compiles, and something in it has the class's name."""
        registry.check_options(NAME, order.config.options)
        user_code.check_file(order.path / (order.model_file or MODEL_FILE), CLASS)

    def _abilities(self) -> tuple[str, ...]:
        decoupled = ("decoupled",) if self._decoupled else ()
        ready = ("ready",) if callable(getattr(self._model, "is_ready", None)) else ()
        return ("ask", *decoupled, *ready)

    def is_ready(self) -> bool:
        """As `abilities.Asks`."""
        assert self._running is not None, "load comes first"
        return self._running.is_ready(self._model.is_ready)

    def ask(self, asked: Sequence[Asked]) -> None:
        """As `abilities.Asks`."""
        assert self._running is not None, "load comes first"
        requests: list[InferenceRequest] = []
        for one in asked:
            request = self._arrived(one)
            if request is not None:
                requests.append(request)
        self._running.run(requests)

    def infer(self, request: InferRequest) -> InferResponse:
        """One request for one answer, waited for."""
        reply = _Collected()
        self.ask([Asked(request, reply)])
        reply.ended.wait()
        if reply.error is not None:
            raise reply.error
        if len(reply.answers) != 1:
            raise InferenceFailedError(
                f"the model sent {len(reply.answers)} responses, where exactly one is wanted"
            )
        return reply.answers[0]

    def unload(self) -> None:
        model, self._model = self._model, None
        try:
            if hasattr(model, "finalize"):
                model.finalize()
        finally:
            self._end()

    def memory(self) -> Memory:
        """On a GPU all that the process has there; of what it is made nobody knows."""
        return {} if self._use is None else {self._device: {"workspace": self._use.bytes(0)}}

    # load ---------------------------------------------------------------------------------------

    def _watch(self, device: str) -> None:
        """From before the model's first line on."""
        self._device = device
        if device.startswith("cuda"):
            self._use = DeviceUse.of(device)
            self._use.before()

    def _share(self, folder: str) -> None:
        """What lies beside the version folders can be imported too."""
        if folder and folder not in sys.path:
            sys.path.append(folder)
            self._shared = folder

    def _complete(self, kind: type, order: Order) -> dict[str, Any]:
        """The config, with what the class adds to it unless that is switched off."""
        config = described.described(order)
        complete = getattr(kind, "auto_complete_config", None)
        if complete is None or order.extra.get("auto_complete") is False:
            return config
        completed = complete(ModelConfig(config))
        if not isinstance(completed, ModelConfig):
            raise LoadFailedError(
                f"auto_complete_config() returned {type(completed).__name__}; it must return the "
                "ModelConfig that it was given"
            )
        return completed.as_dict()

    def _prepare(self, order: Order, config: dict[str, Any]) -> None:
        self._at = (order.model, order.version)
        self._decoupled = described.is_decoupled(config)
        if self._decoupled:
            self._mourner.watch()
        declared = {spec.name: spec.datatype for spec in described.specs(config, "output")}
        states = order.config.sequences.states if order.config.sequences is not None else ()
        if declared:
            declared |= {state.output: state.datatype for state in states}
        self._outgoing = Outgoing(declared, self._utils_of().Logger.log_warn)

    # use ----------------------------------------------------------------------------------------

    def _arrived(self, asked: Asked) -> InferenceRequest | None:
        """As the model sees it; None for one that cannot be shown, which has ended."""
        request, reply = asked
        way = Way(
            reply,
            partial(self._outgoing, request.outputs),
            self._mourner,
            decoupled=self._decoupled,
        )
        self._ways.add(way)
        try:
            kind: type[InferenceRequest] = self._utils_of().InferenceRequest
            wanted = request.outputs or self._outgoing.names
            return kind.arrived(request, wanted, way, self._at)
        except RepositoryError as error:
            way.end(error)
        except (TypeError, ValueError) as error:
            way.end(InvalidRequestError(f"the request cannot be shown to the model: {error}"))
        return None

    def _utils_of(self) -> ModuleType:
        assert self._utils is not None, "load comes first"
        return self._utils

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()
        for way in list(self._ways):
            way.end(InferenceFailedError(UNLOADED))
        self._mourner.stop()
        self._book.close()
        if self._shared in sys.path:
            sys.path.remove(self._shared)
        module, self._module = self._module, None
        if module is not None:
            user_code.forget(module)
        made, self._utils = self._utils, None
        if made is not None:
            utils.remove(made)


class _Collected:
    """A Reply for who waits here."""

    cancelled = False

    def __init__(self) -> None:
        self.answers: list[InferResponse] = []
        self.error: RepositoryError | None = None
        self.ended = threading.Event()

    def send(self, response: InferResponse) -> None:
        self.answers.append(response)

    def last(self, response: InferResponse) -> None:
        self.send(response)
        self.end()

    def end(self, error: RepositoryError | None = None) -> None:
        self.error = error
        self.ended.set()


def _class_of(module: ModuleType) -> type:
    kind = getattr(module, CLASS, None)
    if not isinstance(kind, type):
        raise LoadFailedError(
            f"{MODEL_FILE} has no class '{CLASS}', which a model for Triton's python backend is"
        )
    if not callable(getattr(kind, "execute", None)):
        raise LoadFailedError(f"class '{CLASS}' has no method execute(self, requests)")
    return kind


def _ignore(text: str) -> None: ...
