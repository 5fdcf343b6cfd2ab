"""What was said of adapters by call, as the journal keeps it, and what becomes of it at the next start.

Whatever comes back is looked at anew, under the rules that hold now: one whose files are gone, or lie
where nothing may be read any more, is there as failed, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from repository.adapters.book import AWAY, Away, Entry, Said
from repository.adapters.sources import AdapterSource
from repository.adapting import places
from repository.errors import RepositoryError
from repository.folder.adapters import read_adapter
from repository.journal import Journal, KeptAdapter
from repository.reports import Options


class Recalled(NamedTuple):
    model: str
    name: str
    said: Entry | Away


def note(journal: Journal, model: str, name: str, said: Said) -> None:
    if said is None:
        journal.no_adapter(model, name)
    elif isinstance(said, Away):
        journal.away(model, name)
    else:
        journal.adapter(model, name, _written(said))


def recalled(
    kept: Mapping[str, Mapping[str, KeptAdapter | None]],
    home: Callable[[str], Path],
    options: Options,
) -> Iterator[Recalled]:
    """All that was kept. Reads headers, so it is for a thread. `home`: the folder of a model."""
    for model, adapters in kept.items():
        for name, adapter in adapters.items():
            said = AWAY if adapter is None else _entry(name, adapter, home(model), options)
            yield Recalled(model, name, said)


def _written(entry: Entry) -> KeptAdapter:
    return KeptAdapter(
        entry.src,
        str(entry.source.path),
        entry.origin,
        entry.preload,
        entry.pin,
        dict(entry.options),
    )


def _entry(name: str, kept: KeptAdapter, home: Path, options: Options) -> Entry:
    source, src = _source(name, kept, home, options)
    return Entry(source, src, kept.origin, kept.preload, kept.pin, kept.options)


def _source(
    name: str, kept: KeptAdapter, home: Path, options: Options
) -> tuple[AdapterSource, str]:
    """Where it was; or, where the whole repository has moved, at the same place in it."""
    if kept.origin == "folder":
        return AdapterSource(name, Path(kept.path), ""), kept.src
    problem = ""
    for src in (kept.path, kept.src):
        try:
            place = places.find(src, home, options.root, options.other_roots)
        except RepositoryError as error:
            problem = problem or str(error)
        else:
            return read_adapter(name, place.path, place.root), place.src
    return AdapterSource(name, Path(kept.path), "", problem=problem), kept.src
