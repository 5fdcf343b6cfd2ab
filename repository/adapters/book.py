"""Which adapters one model has, and why: those that lie in its folder, and what people said by call.

It says what is wanted and outlives every generation; what a generation's host knows is held against it
in `adapting`. Pure.

Who wins: a call. A name that is taken cannot be registered again; `update` says more about it, whoever
brought it, and what was said holds until the adapter goes: of one of the folder when its folder does
(whatever is put there meanwhile is followed), of one by call when it is unregistered. Files of its own
that a call named hide what the folder has under that name. What was unregistered stays so until
somebody registers it, or its folder goes and comes back.

What was said by call outlives the server: each change of it is noted in the breath in which it is made.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeAlias

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


class Away(enum.Enum):
    """It lies in the folder, and was unregistered by call."""

    AWAY = enum.auto()


AWAY: Final = Away.AWAY
Said: TypeAlias = Entry | Away | None  # by call, of one name
Note: TypeAlias = Callable[[str, Said], None]


class News(NamedTuple):
    """What became of one name. `entry` None: it is no longer there."""

    what: Literal["registered", "updated", "unregistered"]
    name: str
    entry: Entry | None


class AdapterBook:
    """`revision` rises with every change. `trying`: names of which a call is finding out whether they
    can be had; nobody else says anything of them to a host meanwhile. `note` is told what was said
    last of a name, whenever that changes."""

    def __init__(self, model: str, note: Note = lambda name, said: None) -> None:
        self.model = model
        self._note = note
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
        # Also of those that were recalled, and are gone from the folder since.
        followed = {name for name, entry in self._said.items() if entry.origin == "folder"}
        for name in (self._away | followed) - sources.keys():
            self._say(name, None)
        changed = [n for n, s in sources.items() if s is not before.get(n)]
        return self._tell([*(before.keys() - sources.keys()), *changed])

    # what was said --------------------------------------------------------------------------------

    def said(self, name: str) -> Said:
        return AWAY if name in self._away else self._said.get(name)

    def recall(self, name: str, said: Entry | Away) -> list[News]:
        """What was said before the start. Of one of the folder its source counts for nothing: it is
        there as soon as the folder has it."""
        self._put(name, said)
        return self._tell([name])

    def put_back(self, name: str, said: Said) -> list[News]:
        """A call is undone: `said` is what was said before it. What has left the folder since stays
        gone."""
        lies = name in self._folder
        held = said is AWAY or (isinstance(said, Entry) and said.origin == "folder")
        self._say(name, None if held and not lies else said)
        return self._tell([name])

    def clear(self) -> None:
        """The model is gone: nothing that was said of its adapters counts any more."""
        for name in [*self._said, *self._away]:
            self._say(name, None)

    def _say(self, name: str, said: Said) -> None:
        self._put(name, said)
        self._note(name, said)

    def _put(self, name: str, said: Said) -> None:
        self._said.pop(name, None)
        self._away.discard(name)
        if isinstance(said, Entry):
            self._said[name] = said
        elif said is AWAY:
            self._away.add(name)

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
        self._say(entry.name, entry)
        return self._tell([entry.name])

    def remove(self, name: str) -> list[News]:
        """Raises AdapterNotFoundError."""
        self.get(name)
        self._say(name, AWAY if name in self._folder else None)
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
