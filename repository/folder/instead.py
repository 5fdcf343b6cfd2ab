"""What a load in Triton's way says of a model: a config in place of that in its folder, and perhaps
files in place of the whole folder.

The config belongs to the files that it was said over: once they are others (`over` is their
fingerprint), the folder's own config holds again. Files that were brought lie in the state folder, in a
root of their own (`root`), and never change there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from repository.errors import ConfigError
from repository.folder.aphrodite import REQUEST
from repository.folder.read_pbtxt import triton_layer

KEY = "instead"  # of the journal's notes; no config has such a key


@dataclass(frozen=True)
class Instead:
    """`text`: a ModelConfig in protobuf's JSON. `root`: absolute; "": the model's folder in the
    repository holds, as long as it is `over`."""

    text: str
    over: str = ""
    root: str = ""

    @cached_property
    def digest(self) -> str:
        """Of what was said and brought. 16 hex digits."""
        said = json.dumps([json.loads(self.text), os.path.basename(self.root)], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def holds(self, fingerprint: str) -> bool:
        """For files of this fingerprint."""
        return bool(self.root) or self.over == fingerprint

    def of_files(self, fingerprint: str) -> Instead:
        return self if self.root else replace(self, over=fingerprint)

    def written(self) -> dict[str, Any]:
        """For the journal."""
        files = os.path.basename(self.root)
        return {KEY: {"config": self.text, "over": self.over, "files": files}}


def read_instead(text: str, model: str) -> Instead:
    """Raises ConfigError, which begins with "request: "."""
    try:
        triton_layer(text, model)
    except ConfigError as error:
        where = error.where if error.where.startswith(REQUEST) else REQUEST
        raise ConfigError(error.message, where=where, hint=error.hint) from error
    return Instead(text)


def recalled(values: Mapping[str, Any], model: str, home: str) -> Instead | None:
    """As it was `written`; None: these are the values of another sort of override. `home`: the folder
    of what was brought. Raises ConfigError."""
    said = values.get(KEY)
    if not isinstance(said, Mapping):
        return None
    found = read_instead(str(said.get("config", "")), model)
    files = str(said.get("files", ""))
    if not files:
        return replace(found, over=str(said.get("over", "")))
    root = os.path.join(home, files)
    if not files.isalnum() or not os.path.isdir(root):
        raise ConfigError("the files that it brought are gone", where=REQUEST)
    return replace(found, root=root)
