"""DJL's addresses of adapters: /models/MODEL/adapters[/ADAPTER[/update]].

A model's name may hold '/', also as another "adapters" ("team/adapters/pirate/adapters" are those of
the model "team/adapters/pirate"): what names the model ends at the last /adapters that something of
this form follows. No adapter may be called "adapters", so there is never a second way to read one.

A router matches segments, so the name is made one: `folded` quotes it, `unfolded` takes that back.
Each is done once, to a path that is decoded: what a client has quoted twice stays quoted once.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

PREFIX = "/models/"

_ADAPTERS = re.compile(r"/models/(.+)(/adapters(?:/[^/]+(?:/update)?)?)", re.S)


def folded(path: str) -> str:
    """`path` with the model's name as one segment, where it is such an address; else as it is."""
    if not path.startswith(PREFIX) or (found := _ADAPTERS.fullmatch(path)) is None:
        return path
    return f"{PREFIX}{quote(found[1], safe='', errors='surrogatepass')}{found[2]}"


def unfolded(segment: str) -> str:
    """The model's name."""
    return unquote(segment, errors="surrogatepass")
