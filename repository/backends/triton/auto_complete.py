"""`pb_utils.ModelConfig`: what `auto_complete_config` is given, fills in and gives back.

A config file that says something else than the model wins nothing and loses nothing: the load fails,
and the text names both.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

from repository.backends.triton.datatypes import datatype
from repository.backends.triton.errors import TritonModelException

TENSOR_KEYS = frozenset({"name", "data_type", "dims", "optional"})
NEEDED = ("name", "data_type", "dims")


class ModelConfig:
    """Every setter raises ValueError for what contradicts the config file, or itself."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = copy.deepcopy(dict(config))

    def as_dict(self) -> dict[str, Any]:
        """A copy: writing to it changes nothing."""
        return copy.deepcopy(self._config)

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """One that the config file has must not be larger."""
        said = self._config["max_batch_size"]
        try:
            wanted = operator.index(max_batch_size)
        except TypeError as error:
            raise ValueError(
                f"{self._where()} max_batch_size is {max_batch_size!r}, no whole number"
            ) from error
        if said > wanted:
            raise ValueError(
                f"the config says max_batch_size {said}, {self._where()} sets {wanted}"
            )
        self._config["max_batch_size"] = wanted

    def set_dynamic_batching(self) -> None:
        for other in ("sequence_batching", "ensemble_scheduling"):
            if other in self._config:
                raise ValueError(f"the config says {other}, {self._where()} sets dynamic_batching")
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, bool]) -> None:
        """{"decoupled": bool} and nothing else."""
        if set(transaction_policy_dict) != {"decoupled"}:
            raise ValueError(
                f"{self._where()} a transaction policy has 'decoupled' and nothing else"
            )
        wanted = transaction_policy_dict["decoupled"]
        if not isinstance(wanted, bool):
            raise ValueError(f"{self._where()} decoupled is {wanted!r}, neither True nor False")
        policy = self._config.get("model_transaction_policy", {})
        if policy.get("decoupled", wanted) != wanted:
            raise ValueError(
                f"the config says decoupled {policy['decoupled']}, {self._where()} sets {wanted}"
            )
        self._config["model_transaction_policy"] = {**policy, "decoupled": wanted}

    def add_input(self, input: Mapping[str, Any]) -> None:
        """name, data_type ("TYPE_FP32"), dims; optional."""
        self._add("input", input, TENSOR_KEYS)

    def add_output(self, output: Mapping[str, Any]) -> None:
        """name, data_type, dims."""
        self._add("output", output, TENSOR_KEYS - {"optional"})

    def _add(self, side: str, tensor: Mapping[str, Any], known: frozenset[str]) -> None:
        given = dict(tensor)
        self._check(side, given, known)
        for one in self._config[side]:
            if one["name"] == given["name"]:
                self._compare(side, one, given)
                one.update({k: v for k, v in given.items() if not one.get(k)})
                return
        missing = [key for key in NEEDED if key not in given]
        if missing:
            raise ValueError(
                f"{self._where()} {side} '{given['name']}' lacks {' and '.join(map(repr, missing))}"
            )
        self._config[side].append(given)

    def _check(self, side: str, given: dict[str, Any], known: frozenset[str]) -> None:
        strange = sorted(set(given) - known)
        if strange:
            raise ValueError(
                f"{self._where()} an {side} has '{strange[0]}'; it may have {', '.join(sorted(known))}"
            )
        if not isinstance(given.get("name"), str) or not given["name"]:
            raise ValueError(f"{self._where()} an {side} has no 'name'")
        if "dims" in given:
            try:
                given["dims"] = [operator.index(size) for size in given["dims"]]
            except TypeError as error:
                raise ValueError(
                    f"{self._where()} {side} '{given['name']}' has dims {given['dims']!r}; they must be "
                    "whole numbers"
                ) from error
        if "data_type" in given:
            try:
                datatype(str(given["data_type"]))
            except TritonModelException as error:
                raise ValueError(f"{self._where()} {side} '{given['name']}': {error}") from error

    def _compare(self, side: str, said: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        for key in ("data_type", "dims"):
            if given.get(key, said.get(key)) != said.get(key) and said.get(key):
                raise ValueError(
                    f"{side} '{said['name']}' has {key} {said[key]} in the config, {self._where()} "
                    f"sets {given[key]}"
                )

    def _where(self) -> str:
        return f"auto_complete_config() of model '{self._config['name']}':"
