"""Which adapters one model has, and why: those that lie in its folder, and what people said by call.

It says what is wanted and outlives every generation; what a generation's host knows is held against it
in `adapting`. Pure.

Who wins: a call. A name that is taken cannot be registered again; `update` says more about it, whoever
brought it, and what was said holds until the adapter goes: of one of the folder when its folder does
(whatever is put there meanwhile is followed), of one by call when it is unregistered. Files of its own
that a call named hide what the folder has under that name. What was unregistered stays so until
somebody registers it, or its folder goes and comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from repository.adapters.orders import AdapterOrder
from repository.adapters.sources import AdapterSource
from repository.errors import AdapterNotFoundError, AdapterRefusedError, ConflictError
from repository.names import shown

Origin: TypeAlias = Literal["folder", "call"]
Key: TypeAlias = tuple[object, ...]

NO_WORDS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter as it is wanted. `src` as people are told of it: never an absolute path.

    One of the folder is read when it is first asked for, unless somebody says `preload`: there may
    be thousands.
    """

    source: AdapterSource
    src: str
    origin: Origin = "folder"
    preload: bool = False
    pin: bool = False
    options: Mapping[str, str] = field(default_factory=lambda: NO_WORDS)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def usable(self) -> bool:
        return self.source.facts is not None

    @property
    def key(self) -> Key:
        """Equal keys are equal orders."""
        source, options = self.source, tuple(sorted(self.options.items()))
        return source.fingerprint, source.path, self.preload, self.pin, options

    def order(self) -> AdapterOrder:
        source = self.source
        return AdapterOrder(
            source.name,
            str(source.path),
            source.fingerprint,
            source.files,
            self.preload,
            self.pin,
            options=dict(self.options),
        )


class News(NamedTuple):
    """What became of one name. `entry` None: it is no longer there."""

    what: Literal["registered", "updated", "unregistered"]
    name: str
    entry: Entry | None


class AdapterBook:
    """`revision` rises with every change. `trying`: names of which a call is finding out whether they
    can be had; nobody else says anything of them to a host meanwhile."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.revision = 0
        self.trying: set[str] = set()
        self._entries: dict[str, Entry] = {}
        self._folder: Mapping[str, AdapterSource] = MappingProxyType({})
        self._said: dict[str, Entry] = {}  # by call; of one of the folder all but its source counts
        self._away: set[str] = set()  # unregistered, and still in the folder

    @property
    def entries(self) -> Mapping[str, Entry]:
        """By name, in the order in which they came."""
        return self._entries

    @property
    def settling(self) -> tuple[str, ...]:
        """Names whose files are still being written and that are not there otherwise."""
        there = self._entries
        return tuple(n for n, s in self._folder.items() if s.settling and n not in there)

    def get(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise not_registered(name)
        return entry

    # the folder -----------------------------------------------------------------------------------

    def follow(self, sources: Mapping[str, AdapterSource]) -> list[News]:
        """What has settled in the folder now."""
        before, self._folder = self._folder, sources
        if sources is before:
            return []
        for name in before.keys() - sources.keys():
            self._away.discard(name)
            if name in self._said and self._said[name].origin == "folder":
                del self._said[name]
        changed = [n for n, s in sources.items() if s is not before.get(n)]
        return self._tell([*(before.keys() - sources.keys()), *changed])

    # calls ----------------------------------------------------------------------------------------

    def new(
        self,
        source: AdapterSource,
        src: str,
        *,
        preload: bool = True,
        pin: bool = False,
        options: Mapping[str, str] = NO_WORDS,
    ) -> Entry:
        """What `put` would register; nothing has changed yet.

        Raises ConflictError for a name that is taken, AdapterRefusedError.
        """
        self.check_free(source.name)
        _check_pin(preload, pin)
        return self._followed(
            Entry(source, src, "call", preload, pin, MappingProxyType({**options}))
        )

    def check_free(self, name: str) -> None:
        if name in self._entries:
            raise ConflictError(
                f"The adapter {name} already exists. If you want to replace it, please unregistering "
                f"before registering a new adapter with the same name."
            )

    def changed(
        self,
        name: str,
        *,
        source: AdapterSource | None = None,
        src: str = "",
        preload: bool | None = None,
        pin: bool | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Entry:
        """What `put` would make of one that is there. None: as it was; options are laid over the old
        ones. Raises AdapterNotFoundError, AdapterRefusedError."""
        old = self.get(name)
        pinned = old.pin if pin is None else pin
        if preload is not None:
            _check_pin(preload, pinned)
        new = replace(
            old,
            pin=pinned,
            preload=(old.preload or pinned) if preload is None else preload,
            options=MappingProxyType({**old.options, **(options or {})}),
        )
        return new if source is None else self._followed(replace(new, source=source, src=src))

    def put(self, entry: Entry) -> list[News]:
        """As `new` or `changed` made it. Raises AdapterNotFoundError for one of the folder that has
        left it since."""
        lies = self._folder.get(entry.name)
        if entry.origin == "folder" and (lies is None or lies.settling):
            raise not_registered(entry.name)
        self._said[entry.name] = entry
        self._away.discard(entry.name)
        return self._tell([entry.name])

    def remove(self, name: str) -> list[News]:
        """Raises AdapterNotFoundError."""
        self.get(name)
        self._said.pop(name, None)
        if name in self._folder:
            self._away.add(name)
        return self._tell([name])

    def touch(self) -> None:
        """Whoever holds something against the book is to look again."""
        self.revision += 1

    # small things ---------------------------------------------------------------------------------

    def _followed(self, entry: Entry) -> Entry:
        """One whose files are those of the folder's adapter of that name is the folder's."""
        lies = self._folder.get(entry.name)
        same = lies is not None and lies.path == entry.source.path
        return replace(entry, origin="folder" if same else "call")

    def _tell(self, names: list[str]) -> list[News]:
        news = []
        for name in names:
            old, new = self._entries.get(name), self._made(name)
            if new == old:
                continue
            if new is None:
                del self._entries[name]
                news.append(News("unregistered", name, None))
            else:
                self._entries[name] = new
                news.append(News("registered" if old is None else "updated", name, new))
        if news:
            self.revision += 1
        return news

    def _made(self, name: str) -> Entry | None:
        said = self._said.get(name)
        if said is not None and said.origin == "call":
            return said
        lies = self._folder.get(name)
        if lies is None or lies.settling or name in self._away:
            return None
        return replace(said, source=lies) if said is not None else Entry(lies, f"adapters/{name}")


def not_registered(name: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"The adapter {shown(name, 200)} has not been registered")


def _check_pin(preload: bool, pin: bool) -> None:
    if pin and not preload:
        raise AdapterRefusedError("Can not set preload to false and pin to true")
