"""Which folders are models, and which files belong to which version. Names and stats only.

    digits/                 a model: it holds a config, or version folders, or model files
      config.yaml           shared by all versions, as is every file and folder not named below
      aphrodite_config.yaml likewise, in place of it or beside it
      checks/               shared
      1/ 2/                 versions: whole numbers from 1, holding at least one file
      01/                   ignored, and told
      adapters/             the model's own, never part of a fingerprint; not in a version's folder,
                            unless it belongs to the code there
    org/                    a namespace: neither of the three, so its folders are looked at
      bert/model.onnx       the model "org/bert"; without version folders it is its own version 1
      llama/config.json ... a Hugging Face folder is one, with all that lies in it
    ViT-L/14/1/model.onnx   the model "ViT-L/14": a number that holds version folders is no version

What a folder looks like but may not be (a bad name, a link out) is a Problem, never an exception.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from repository.errors import InvalidNameError
from repository.folder.huggingface import is_huggingface
from repository.folder.walk import Lister, Listing, ignored
from repository.names import MAX_SEGMENTS, check_name, check_version, inside, shown
from repository.snapshot import Problem
from repository.spec import FileStamp

CONFIGS = ("config.yaml", "config.pbtxt")
APHRODITE = ("aphrodite_config.yaml", "aphrodite_config.yml")  # said over the others
_CONFIGS = CONFIGS + APHRODITE
NOT_SERVED = frozenset({"adapters"})  # changes there concern no generation
# Folders of a model without version folders that belong to the model and not to its version 1.
OF_THE_MODEL = frozenset({"checks", "warmup", "configs", "initial_state"})
# Folders in a Hugging Face folder that are no models of their own, whatever lies in them.
_PART = re.compile(r"[0-9]+_\w+|onnx|openvino|original")
_MODEL_ENDINGS = (".onnx", ".safetensors", ".pt2", ".pt")


@dataclass(slots=True)
class Found:
    """One model as it lies on the disk.

    folder      real path
    shared      files that belong to every version; paths are relative to `folder`
    versions    number -> its files, also relative to `folder` ("1/model.onnx")
    paths       number -> real path of the version's folder
    flat        there are no version folders: the model's folder is version 1
    adapters    real path of its folder of adapters, "" where there is none
    empty       folders that would be versions, if anything lay in them: number -> real path
    notes       problems; those of one version carry its number
    """

    name: str
    folder: str
    shared: tuple[FileStamp, ...] = ()
    versions: dict[int, tuple[FileStamp, ...]] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    flat: bool = False
    newest_ctime_ns: int = 0
    adapters: str = ""
    notes: list[Problem] = field(default_factory=list)
    empty: dict[int, str] = field(default_factory=dict)


def with_empty(found: Found) -> Found:
    """As a model that needs no files of its own (an ensemble) sees it: an empty version folder is a
    version, and where there is no folder at all the model is version 1."""
    if not found.versions and not found.empty:
        return replace(found, versions={1: ()}, paths={1: found.folder}, flat=True)
    versions = {**dict.fromkeys(found.empty, ()), **found.versions}
    return replace(found, versions=versions, paths={**found.empty, **found.paths})


@dataclass(slots=True)
class _Numbers:
    """The folders of one folder that are named by digits."""

    versions: dict[int, Listing] = field(default_factory=dict)
    misnamed: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    notes: dict[int, list[Problem]] = field(default_factory=dict)
    empty: dict[int, str] = field(default_factory=dict)


class Layout:
    """One look at the repository. `notes` collects what belongs to no model."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        self.notes: list[Problem] = []
        self._lister = Lister(self.root)

    def models(self) -> Iterator[Found]:
        """Every model, in no order."""
        top = self._lister.look(self.root, "", 0, self.notes)
        loose = [n for n in top.files if _is_model_file(n) or n in _CONFIGS]
        if loose:
            message = f"'{shown(min(loose))}' lies directly in the repository folder"
            hint = "each model needs its own folder; did you mean the folder above this one?"
            self.notes.append(Problem(shown(min(loose)), "layout", message, hint, warning=True))
        for name in top.folders:
            yield from self._look(top, name)

    def model(self, name: str) -> Found | None:
        """One model; None if there is none of that name. Raises InvalidNameError."""
        segments = check_name(name).split("/")
        if any(map(ignored, segments)):
            return None
        path = self.root
        for depth, segment in enumerate(segments, 1):
            path = os.path.realpath(os.path.join(path, segment))
            if not inside(self.root, path) or not os.path.isdir(path):
                return None
            notes: list[Problem] = []
            rel = "/".join(segments[:depth])
            listing = self._lister.look(path, rel, _ctime_ns(path), notes)
            numbers = self._numbers(listing)
            here = self._is_model(listing, numbers)
            if depth == len(segments):
                return self._read(listing, numbers, notes) if here else None
            if here and segments[depth] not in numbers.models:
                return None
        return None

    def _look(self, above: Listing, name: str) -> Iterator[Found]:
        notes: list[Problem] = []
        listing = self._lister.below(above, name, notes)
        numbers = self._numbers(listing)
        below = list(listing.folders)
        if self._is_model(listing, numbers):
            try:
                check_name(listing.rel)
            except InvalidNameError as error:
                where = shown(listing.rel)
                self.notes.append(Problem(where, "name", str(error), "rename the folder"))
            else:
                yield self._read(listing, numbers, notes)
            below = numbers.models
        else:
            self.notes += notes
            if listing.rel.count("/") >= MAX_SEGMENTS - 1:
                return
        for deeper in below:
            yield from self._look(listing, deeper)

    def _numbers(self, listing: Listing) -> _Numbers:
        found = _Numbers()
        for name in listing.folders:
            if not _is_number(name):
                continue
            notes: list[Problem] = []
            sub = self._lister.below(listing, name, notes)
            if not sub.files and not notes and not sub.folders:
                if re.fullmatch("[1-9][0-9]{0,17}", name):
                    found.empty[int(name)] = sub.path
                continue  # just made: something is about to be copied into it
            if self._is_numbered_model(sub):
                found.models.append(name)
            elif sub.files or notes:
                try:
                    number = check_version(name)
                except InvalidNameError:
                    found.misnamed.append(name)
                else:
                    found.versions[number] = sub
                    found.notes[number] = notes
        return found

    def _is_numbered_model(self, sub: Listing) -> bool:
        """It holds numbered folders with files, and no model file of its own."""
        if any(map(_is_model_file, sub.files)):
            return False
        return any(self._lister.below(sub, n, []).files for n in sub.folders if _is_number(n))

    def _is_model(self, listing: Listing, numbers: _Numbers) -> bool:
        """A Hugging Face folder is one from its first file on, so that what it lacks is told; but a
        config.json of somebody's own does not hide the models below it."""
        if _looks_like_model(listing, numbers):
            return True
        return is_huggingface(listing.files) and not self._holds_models(listing)

    def _holds_models(self, listing: Listing) -> bool:
        if listing.rel.count("/") >= MAX_SEGMENTS - 1:
            return False
        for name in listing.folders:
            if name in OF_THE_MODEL | NOT_SERVED or _PART.fullmatch(name):
                continue
            notes: list[Problem] = []
            sub = self._lister.below(listing, name, notes)
            self.notes += (p for p in notes if p.where == ".")  # the scan's budget is used up
            if _looks_like_model(sub, self._numbers(sub)) or self._holds_models(sub):
                return True
        return False

    def _read(self, listing: Listing, numbers: _Numbers, notes: list[Problem]) -> Found:
        notes = [_placed(p, listing.rel) for p in notes]
        found = Found(listing.rel, listing.path, notes=notes, newest_ctime_ns=listing.ctime_ns)
        found.empty = numbers.empty
        found.adapters = listing.folders.get("adapters", ("", 0))[0]
        for name in numbers.misnamed:
            where = f"{listing.rel}/{name}"
            message = "not a version: a version is a whole number from 1 without leading zeros"
            notes.append(Problem(where, "version", message, "rename the folder", warning=True))
        for number, sub in numbers.versions.items():
            mine = numbers.notes[number]
            if "adapters" in sub.folders and "model.py" not in sub.files:
                del sub.folders["adapters"]
                _note_adapters(sub, number, notes)
            found.versions[number] = tuple(sorted(self._lister.stamps(sub, f"{number}/", mine)))
            found.paths[number] = sub.path
            found.newest_ctime_ns = max(found.newest_ctime_ns, sub.ctime_ns)
            notes += [_of_version(p, number) for p in mine]
        rest = {
            name: folder
            for name, folder in listing.folders.items()
            if name not in NOT_SERVED
            and not _is_number(name)
            # "latest -> 3" is a name for a version, not one more folder of the model.
            and folder[0] not in found.paths.values()
        }
        if not numbers.versions and (
            any(map(_is_model_file, listing.files)) or is_huggingface(listing.files)
        ):
            self._read_flat(listing, rest, found)
        else:
            whole = Listing(listing.path, listing.rel, 0, listing.files, rest)
            found.shared = tuple(sorted(self._lister.stamps(whole, "", notes)))
            _note_misplaced(listing, numbers, notes)
        for stamps in (found.shared, *found.versions.values()):
            newest = max((s.ctime_ns for s in stamps), default=0)
            found.newest_ctime_ns = max(found.newest_ctime_ns, newest)
        return found

    def _read_flat(self, listing: Listing, rest: dict[str, tuple[str, int]], found: Found) -> None:
        shared, own = (
            Listing(
                listing.path,
                listing.rel,
                0,
                {n: s for n, s in listing.files.items() if (n in _CONFIGS) is of_model},
                {n: f for n, f in rest.items() if (n in OF_THE_MODEL) is of_model},
            )
            for of_model in (True, False)
        )
        found.flat = True
        found.paths[1] = listing.path
        found.shared = tuple(sorted(self._lister.stamps(shared, "", found.notes)))
        found.versions[1] = tuple(sorted(self._lister.stamps(own, "", found.notes)))


def _is_model_file(name: str) -> bool:
    return name == "model.py" or name.endswith(_MODEL_ENDINGS)


def _looks_like_model(listing: Listing, numbers: _Numbers) -> bool:
    return bool(
        numbers.versions
        or numbers.misnamed
        or any(n in _CONFIGS or _is_model_file(n) for n in listing.files)
    )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _note_misplaced(listing: Listing, numbers: _Numbers, notes: list[Problem]) -> None:
    for name in filter(_is_model_file, listing.files):
        message = f"'{shown(name)}' lies beside the version folders and is not served"
        hint = "move it into a version folder"
        where = shown(f"{listing.rel}/{name}")
        notes.append(Problem(where, "layout", message, hint, warning=True))
    for number, sub in numbers.versions.items():
        for name in (n for n in _CONFIGS if n in sub.files):
            where = f"{sub.rel}/{name}"
            message = "a config in a version folder is not read"
            hint = "move it to the model's folder"
            notes.append(Problem(where, "layout", message, hint, number, warning=True))


def _note_adapters(sub: Listing, number: int, notes: list[Problem]) -> None:
    where = shown(f"{sub.rel}/adapters")
    message = "adapters in a version folder are not used"
    hint = "move the folder to the model's folder"
    notes.append(Problem(where, "layout", message, hint, number, warning=True))


def _placed(problem: Problem, rel: str) -> Problem:
    """A version folder that cannot be entered is that version's problem, not the model's."""
    try:
        return _of_version(problem, check_version(problem.where.removeprefix(rel + "/")))
    except InvalidNameError:
        return problem


def _of_version(problem: Problem, number: int) -> Problem:
    return Problem(problem.where, problem.rule, problem.message, problem.hint, number)


def _ctime_ns(path: str) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except OSError:
        return 0
