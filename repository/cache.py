"""Answers that models have given, for requests that say the same again: one memory for all models that
want it (`response_cache` in their config), with a shelf for each generation.

Rules: what is kept is a copy, never a view of memory that a request or a worker holds. All together
take no more than `limit` bytes: what nobody has asked for the longest leaves first. A shelf belongs to
one generation; once it is closed it finds and keeps nothing, and what lay on it leaves. All calls come
from the event loop's thread, but for `key_of`. It knows no models, hosts or futures.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from repository.forms import OF_THE_QUEUE, Form, form_of
from repository.messages import InferRequest, InferResponse, Parameters
from repository.reports import CacheReport
from repository.tensors import Tensor

KEY_SIZE = 32  # bytes of a digest: two requests that share one are not to be found
# Bytes that an answer takes here beside its tensors' own, and each tensor, as measured.
OF_ENTRY, OF_TENSOR = 600, 150
SHARE = 4  # one answer may take so many parts of the whole
LARGEST = 4 << 20  # and at most that: it is copied while nobody else is served
SWEEP = 500  # answers that leave at once
FORMS = 32  # of one generation's answers that are kept with them: most look alike


def key_of(request: InferRequest) -> bytes:
    """What a model sees of it, as a digest: inputs, outputs that are asked for, parameters. Its time
    grows with the inputs' bytes; callable from any thread."""
    form = request.form
    if form is None:
        form = form_of(request.inputs, request.outputs, request.parameters)
    if form.key is None:
        form.key = _said(form)
    digest = blake2b(form.key, digest_size=KEY_SIZE)
    for tensor in request.inputs:
        digest.update(tensor.data)
    return digest.digest()


def _said(form: Form) -> bytes:
    """All but the bytes. `repr` tells 1 from 1.0 and from True, and so may a model."""
    told = sorted((k, v) for k, v in form.parameters.items() if k not in OF_THE_QUEUE)
    return repr(([tuple(blank) for blank in form.blanks], form.outputs, told)).encode()


class Entry(msgspec.Struct, gc=False, eq=False):
    """One answer. `size`: bytes that it takes here. It holds nothing that could hold it, so the garbage
    collector need not go through a million of them."""

    key: bytes
    size: int
    outputs: tuple[Tensor, ...]
    parameters: Parameters
    form: Form | None

    @classmethod
    def of(cls, key: bytes, response: InferResponse, size: int, form: Form | None) -> Entry:
        """A copy, with this form."""
        outputs = [Tensor(t.name, t.datatype, t.shape, bytes(t.data)) for t in response.outputs]
        return cls(key, size, tuple(outputs), dict(response.parameters), form)

    def response(self) -> InferResponse:
        """A fresh one; only the tensors' bytes are shared."""
        outputs = [Tensor(t.name, t.datatype, t.shape, t.data) for t in self.outputs]
        return InferResponse(outputs, dict(self.parameters), form=self.form)


class ResponseCache:
    """`limit` and `size` in bytes. `evictions`: answers that left because others needed their room."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.evictions = 0
        self._largest = min(limit // SHARE, LARGEST)
        self._order: OrderedDict[Entry, Shelf] = OrderedDict()  # the one to leave next comes first
        self._leaving: list[dict[bytes, Entry]] = []  # of shelves that are closed

    def __len__(self) -> int:
        return len(self._order)

    def shelf(self) -> Shelf:
        return Shelf(self)

    def report(self) -> CacheReport:
        return CacheReport(self.limit, self.size, len(self._order), self.evictions)

    def sweep(self, most: int = SWEEP) -> bool:
        """Of what lay on closed shelves, so many answers leave. Are there more?"""
        while self._leaving and most:
            entries = self._leaving[-1]
            while entries and most:
                _, entry = entries.popitem()
                del self._order[entry]
                self.size -= entry.size
                most -= 1
            if not entries:
                self._leaving.pop()
        return bool(self._leaving)

    # for shelves ------------------------------------------------------------------------------------

    def used(self, entry: Entry) -> None:
        self._order.move_to_end(entry)

    def takes(self, size: int) -> bool:
        return size <= self._largest

    def add(self, entry: Entry, shelf: Shelf) -> None:
        while self._order and self.size + entry.size > self.limit:
            if self._leaving:
                self.sweep(1)
            else:
                self.drop(next(iter(self._order)))
                self.evictions += 1
        self._order[entry] = shelf
        self.size += entry.size

    def drop(self, entry: Entry) -> None:
        del self._order.pop(entry).entries[entry.key]
        self.size -= entry.size

    def leave(self, entries: dict[bytes, Entry]) -> None:
        if entries:
            self._leaving.append(entries)


class Shelf:
    """What one generation has answered. `entries` are the cache's to change."""

    __slots__ = ("_cache", "_closed", "_forms", "entries")

    def __init__(self, cache: ResponseCache) -> None:
        self.entries: dict[bytes, Entry] = {}
        self._cache = cache
        self._closed = False
        self._forms: set[Form] = set()

    def find(self, key: bytes) -> InferResponse | None:
        entry = self.entries.get(key)
        if entry is None:
            return None
        self._cache.used(entry)
        return entry.response()

    def keep(self, key: bytes, response: InferResponse) -> bool:
        """A copy of it, in place of what was there of that key. False: it is too large, or the shelf is
        closed."""
        size = size_of(response.outputs, response.parameters)
        if self._closed or not self._cache.takes(size):
            return False
        old = self.entries.get(key)
        if old is not None:
            self._cache.drop(old)
        entry = Entry.of(key, response, size, self._shared(response.form))
        self._cache.add(entry, self)
        self.entries[key] = entry
        return True

    def _shared(self, form: Form | None) -> Form | None:
        """None where texts, or ever other shapes, make each answer's form its own: that is as large as a
        small answer, which does without."""
        if form is None or not form.fixed:
            return None
        if form not in self._forms:
            if len(self._forms) >= FORMS:
                return None
            self._forms.add(form)
        return form

    def close(self) -> bool:
        """Nothing is found here any more. Is there something that `ResponseCache.sweep` has to clear
        away? Again: nothing."""
        if self._closed:
            return False
        self._closed = True
        entries, self.entries = self.entries, {}
        self._cache.leave(entries)
        return bool(entries)


def size_of(outputs: Sequence[Tensor], parameters: Parameters) -> int:
    """Bytes that such an answer takes here."""
    of_parameters = sys.getsizeof(repr(parameters)) if parameters else 0
    return OF_ENTRY + of_parameters + sum([OF_TENSOR + len(t.data) for t in outputs])
