"""The page: text of all models and of the server, put together by family.

Each model's lines are kept by family, and written anew only when what they were made of has changed; of
a thousand models few do between two scrapes. A family of which nothing has changed is not put together
again either. Call it from one thread at a time, whichever: it rests now and then, so that the event loop
gets the interpreter when it wants it instead of after a switch interval (5 ms).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from server.metrics import names, rows, triton_names
from server.metrics.counts import Values
from server.metrics.lines import Sheet, Text, header, tagged
from server.metrics.meter import UNKNOWN_MODEL
from server.metrics.names import Family
from server.metrics.own import Own
from server.metrics.reading import ModelRow, Reading, WorkRow
from server.metrics.tally import Frozen

WORK_S = 0.0002  # between two rests
REST_S = 0.00005  # enough for a waiting thread to be there first
NO_COUNTS: Values = {}
NO_TALLIES: Frozen = {}
NO_TEXT = Text({}, {})
Change: TypeAlias = tuple[Text, Text]  # before, now


class Rests:
    """Lets others have the interpreter. Each `now` may be a rest."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def now(self) -> None:
        if time.perf_counter() - self._since >= WORK_S:
            time.sleep(REST_S)
            self._since = time.perf_counter()


class _Part:
    """Some of a model's text, and what it was made of."""

    __slots__ = ("_made_of", "_sheet", "text")

    def __init__(self) -> None:
        self._sheet = Sheet()
        self._made_of: tuple[object, ...] = ()
        self.text = NO_TEXT

    def renew(self, *made_of: object) -> Sheet | None:
        """Where to put it anew; None: it is what it was."""
        if made_of == self._made_of:
            return None
        self._made_of = made_of
        return self._sheet

    def written(self, tags: Sequence[tuple[str, str]] = ()) -> Text:
        self.text = tagged(self._sheet.text(), tags) if tags else self._sheet.text()
        return self.text


class _Kept:
    """One model's text, in parts that change at different times."""

    __slots__ = ("_counts", "_row", "_traffic", "_triton")

    def __init__(self) -> None:
        self._counts, self._row, self._traffic, self._triton = (_Part() for _ in range(4))

    def texts(self) -> list[Text]:
        return [part.text for part in (self._counts, self._row, self._traffic, self._triton)]

    def renew(
        self, row: ModelRow, counts: Values, tallies: Frozen, gpus: Mapping[str, str] | None
    ) -> Iterator[Change]:
        """What is new. `gpus` None: without Triton's names."""
        if (sheet := self._counts.renew(counts)) is not None:
            rows.put_counts(sheet, counts)
            yield self._counts.text, self._counts.written()
        if (sheet := self._row.renew(row)) is not None:
            rows.put_model(sheet, row)
            yield self._row.text, self._row.written()
        yield from self.renew_traffic(row.name, row.work, tallies)
        if gpus is None:
            return
        if (sheet := self._triton.renew(row, row.work, tallies, gpus)) is not None:
            triton_names.put_model(sheet, row, tallies, gpus)
            yield self._triton.text, self._triton.written(row.tags)

    def renew_traffic(
        self, name: str, work: Sequence[WorkRow], tallies: Frozen
    ) -> Iterator[Change]:
        if (sheet := self._traffic.renew(work, tallies)) is not None:
            rows.put_work(sheet, name, work)
            for version, tally in tallies.items():
                rows.put_tally(sheet, name, version, tally)
            yield self._traffic.text, self._traffic.written()


class _Block:
    """The lines of one family, by whose they are, and all of them as they were joined last: in the older
    format, and in OpenMetrics."""

    __slots__ = ("_joined", "_plain", "_rich")

    def __init__(self) -> None:
        self._plain: dict[str, bytes] = {}
        self._rich: dict[str, bytes] = {}
        self._joined: dict[bool, bytes] = {}

    def put(self, name: str, plain: bytes | None, rich: bytes | None) -> None:
        """None: it has none (any more)."""
        for lines, new in ((self._plain, plain), (self._rich, rich)):
            if lines.get(name) != new:
                self._joined.clear()
                if new is None:
                    del lines[name]
                else:
                    lines[name] = new

    def joined(self, *, openmetrics: bool) -> bytes:
        found = self._joined.get(openmetrics)
        if found is None:
            lines = self._plain | self._rich if openmetrics and self._rich else self._plain
            found = self._joined[openmetrics] = b"".join(lines.values())
        return found


class Page:
    """`triton`: with Triton's names."""

    def __init__(self, *, triton: bool = True) -> None:
        self._triton = triton
        self._build = rows.build_info()
        self._server = Sheet()
        self._server_text = NO_TEXT
        self._kept: dict[str, _Kept] = {}
        self._groups: list[tuple[Family, ...]] = [(family,) for family in names.ALL]
        if triton:
            self._groups += triton_names.ALL
        self._blocks = {family: _Block() for group in self._groups for family in group}
        self._own = Own()

    def write(self, reading: Reading, *, openmetrics: bool = False, end: bytes = b"") -> bytes:
        """`end`: what comes behind it."""
        self._take(reading)
        rests = Rests()
        parts: list[bytes] = []
        for group in self._groups:
            found = [self._blocks[family].joined(openmetrics=openmetrics) for family in group]
            if any(found):
                parts += (header(group[0], openmetrics=openmetrics), *found)
            rests.now()
        own = self._own.write(reading.own, openmetrics=openmetrics, rest=rests.now)
        parts += (own, end)
        return b"".join(parts)

    def _take(self, reading: Reading) -> None:
        rests = Rests()
        gpus = triton_names.uuids(reading.devices) if self._triton else None
        rows.put_server(self._server, reading, self._build)
        if self._triton:
            triton_names.put_devices(self._server, reading.devices, reading.host)
        before, self._server_text = self._server_text, self._server.text()
        self._show("", before, self._server_text)
        gone = self._kept.keys() - {row.name for row in reading.models} - {UNKNOWN_MODEL}
        for name in gone:
            for text in self._kept.pop(name).texts():
                self._show(name, text, NO_TEXT)
        for row in reading.models:
            counts = reading.counts.get(row.name, NO_COUNTS)
            tallies = reading.tallies.get(row.name, NO_TALLIES)
            for before, now in self._of(row.name).renew(row, counts, tallies, gpus):
                self._show(row.name, before, now)
            rests.now()
        tallies = reading.tallies.get(UNKNOWN_MODEL, NO_TALLIES)
        for before, now in self._of(UNKNOWN_MODEL).renew_traffic(UNKNOWN_MODEL, (), tallies):
            self._show(UNKNOWN_MODEL, before, now)

    def _of(self, model: str) -> _Kept:
        kept = self._kept.get(model)
        if kept is None:
            kept = self._kept[model] = _Kept()
        return kept

    def _show(self, name: str, before: Text, now: Text) -> None:
        old, rich = before.plain, before.rich or now.rich
        for family, new in now.plain.items():
            if old.get(family) is not new or rich:
                self._blocks[family].put(name, new, now.rich.get(family))
        for family in old.keys() - now.plain.keys():
            self._blocks[family].put(name, None, None)
