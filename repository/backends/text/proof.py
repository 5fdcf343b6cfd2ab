"""Can this model be stepped through slots? Asked of the model itself, not of a list of names.

It must keep one plain cache per layer (all keys and values, none dropped, none shared), take
positions and a mask from outside, and then say through slots what it says without any cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from repository.backends.text.cache import LayerShape, SlotCache
from repository.backends.text.engine import Runner
from repository.errors import LoadFailedError

# What a model may raise that is asked for something it was not made for.
FOREIGN = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
FIRST, SECOND = 7, 4  # tokens of the two rows
# How far logits may be apart, as a part of the largest.
TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class NotPlainError(Exception):
    """Why the slots engine cannot run it."""


@torch.inference_mode()
def widths(model: Any, device: str) -> int:
    """One forward without any cache: the width of the logits. A model whose attention cannot run as
    it was built is put on the slow, general one. Raises LoadFailedError: it does not run at all."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        return int(model(input_ids=ids, use_cache=False).logits.shape[-1])
    except FOREIGN:
        pass  # it is asked again, more simply
    try:
        model.set_attn_implementation("eager")
        return int(model(input_ids=ids, use_cache=False).logits.shape[-1])
    except FOREIGN as error:
        reason = (str(error).splitlines() or [""])[0]
        raise LoadFailedError(
            f"the model does not run: {type(error).__name__}: {reason}"
        ) from error


@torch.inference_mode()
def shapes(model: Any, max_len: int, device: str) -> list[LayerShape]:
    """What each layer keeps of a token. Raises NotPlainError."""
    config = model.config
    if config.is_encoder_decoder or model._is_stateful:
        raise NotPlainError("it keeps a state, not keys and values")
    takes = inspect.signature(model.forward).parameters
    for name in ("attention_mask", "position_ids", "past_key_values"):
        if name not in takes:
            raise NotPlainError(f"its forward takes no {name}")
    _check_angles(config.get_text_config(), max_len)
    try:
        cache = DynamicCache(config=config)
        for layer in cache.layers:
            _check_layer(layer, max_len)
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        return [_shape(layer) for layer in cache.layers]
    except FOREIGN as error:
        raise NotPlainError(f"its cache is not plain ({type(error).__name__})") from error


def _check_layer(layer: Any, max_len: int) -> None:
    if type(layer) is DynamicLayer:
        return
    if type(layer) is not DynamicSlidingWindowLayer:
        raise NotPlainError(f"a layer keeps a {type(layer).__name__}")
    if layer.sliding_window < max_len:
        raise NotPlainError(
            f"a layer sees the last {layer.sliding_window} tokens, fewer than max_len {max_len}"
        )


def _check_angles(config: Any, max_len: int) -> None:
    """Angles that are other ones as soon as any row of a forward is long would make what a row says
    depend on its company."""
    said = getattr(config, "rope_parameters", None) or {}
    for one in (said, *(part for part in said.values() if isinstance(part, dict))):
        short = one.get("original_max_position_embeddings") or max_len
        if one.get("rope_type") == "longrope" and short < max_len:
            raise NotPlainError(
                f"its positions mean something else beyond {short} tokens, fewer than max_len {max_len}"
            )


def _shape(layer: Any) -> LayerShape:
    keys, values = layer.keys.shape, layer.values.shape
    if len(keys) != 4 or keys[:3] != values[:3] or keys[0] != 1 or keys[2] != 2:
        raise NotPlainError(f"a layer keeps keys of shape {list(keys)}")
    return LayerShape(heads=keys[1], key_size=keys[3], value_size=values[3])


@torch.inference_mode()
def prove(runner: Runner, vocab: int) -> None:
    """Two rows of different length, one read in pieces, then stepped together. Raises NotPlainError."""
    model, device = runner.model, runner.device
    one, other = _tokens(FIRST, 1, vocab), _tokens(SECOND, 2, vocab)
    try:
        plain = [
            model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
            for ids in (one, other)
        ]
        got = [
            runner(0, [one[:3]], [0], 0),
            runner(0, [one[3:5], other[:2]], [3, 0], 0),
            runner(0, [one[5:6], other[2:3]], [5, 2], 1),
            runner(0, [one[6:7], other[3:4]], [6, 3], 1),
        ]
    except FOREIGN as error:
        raise NotPlainError(f"it does not run through slots ({type(error).__name__})") from error
    stepped = (torch.cat([part[0] for part in got]), torch.cat([part[1] for part in got[1:]]))
    for expected, found in zip(plain, stepped, strict=True):
        apart = (expected.float() - found.float()).abs().max().item()
        limit = TOLERANCE[runner.dtype] * expected.float().abs().max().item()
        if not apart <= limit:
            raise NotPlainError(
                f"its logits through slots are {apart:.3g} away from plain ones; {limit:.3g} allowed"
            )


def _tokens(count: int, step: int, vocab: int) -> list[int]:
    return [(1 + 37 * step * i) % vocab for i in range(count)]


def runner(model: Any, cache: SlotCache, device: str) -> Runner:
    return Runner(
        model=model,
        cache=cache,
        device=device,
        dtype=model.dtype,
        picks="logits_to_keep" in inspect.signature(model.forward).parameters,
    )
