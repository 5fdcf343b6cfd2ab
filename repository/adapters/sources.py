"""An adapter as its files say it is. Plain data, made by a scan (`folder.adapters`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from repository.adapters.orders import AdapterFile


class AdapterFacts(msgspec.Struct, frozen=True, array_like=True):
    """What the header and the config of a PEFT LoRA adapter say (see `adapters.peft`).

    modules   the layers that it changes, as PEFT names them without its prefix
              ("model.layers.0.self_attn.q_proj"): [out, in] features of each
    rank      the largest of any layer
    bytes     of its tensors
    base      the model that it was made for, as its config says; only told
    """

    modules: dict[str, tuple[int, int]]
    rank: int
    bytes: int
    base: str = ""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One folder of an adapter.

    path         real, inside an allowed root
    fingerprint  of `files`
    facts        None: it cannot be used, and `problem` says why and what to do. With both, what was
                 there before is still known, and `problem` is what is wrong with its replacement
    settling     its files are still being written; nothing else of it is known
    newest_ctime as in `snapshot.ModelFolder`
    """

    name: str
    path: Path
    fingerprint: str
    files: tuple[AdapterFile, ...] = ()
    facts: AdapterFacts | None = None
    problem: str = ""
    settling: bool = False
    newest_ctime: float = field(default=0.0, compare=False)
