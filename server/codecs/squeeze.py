"""gzip and deflate, of infer's bodies and answers: what a client wishes, and the work itself.

Inflating is bounded: it goes in steps, and stops at the first byte past the limit, so that a bomb costs
no more than the largest body that is allowed. Both work on whole bodies and belong into a thread where
these are large (zlib lets other threads run meanwhile).

An answer is compressed where a client asks for that, and it pays. A plain list of codings, as HTTP
libraries put it into every request unasked ("gzip, deflate, br"), is no wish to wait for: only long
text is compressed then. One coding alone, or a weight (";q="), is what somebody wrote.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from repository.errors import InvalidRequestError
from repository.tensors import Buffer
from server.refusals import PayloadTooLargeError, UnsupportedError

GZIP, DEFLATE = "gzip", "deflate"
ACCEPTED = f"{GZIP}, {DEFLATE}"
EITHER = 15 + 32  # zlib's window, and its word for: see from the first bytes which of both it is
WINDOWS = {GZIP: 15 + 16, DEFLATE: 15}  # "deflate" means zlib's wrapping (RFC 9110, 8.4.1.2)
LEVEL = 1  # a local network is faster than any higher one
STEP = 1 << 20  # bytes that are inflated or deflated at once
LEAST = 1024  # bytes of tensors below which an answer is plain: it is one packet either way
LONGEST_WISH = 512  # bytes of the header; who says more gets plain bytes
LEAST_UNASKED = 64 * 1024  # of text, where nobody asked in person


# requests -----------------------------------------------------------------------------------------


def packing_of(said: bytes) -> str | None:
    """What a body is compressed with, of Content-Encoding's value: "gzip", "deflate", or None.

    Raises UnsupportedError for another, or for more than one.
    """
    found = said.decode("latin-1").strip().lower()
    if found in ("", "identity"):
        return None
    if found in WINDOWS:
        return found
    raise UnsupportedError("Unsupported compression type", headers={"Accept-Encoding": ACCEPTED})


def refuse_packed(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """For routes whose bodies must be plain. Raises InvalidRequestError."""
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise InvalidRequestError(
                "Content-Encoding is understood by infer alone: send the body as it is, without it"
            )


def inflated(body: Buffer, most: int) -> bytearray:
    """What was compressed, of `most` bytes at most. As Triton: gzip or zlib, whichever was said.

    Raises PayloadTooLargeError, InvalidRequestError for what is neither, ends early or goes on behind
    its end.
    """
    inflater = zlib.decompressobj(EITHER)
    view, at = memoryview(body), 0
    found = bytearray()
    left: Buffer = b""
    try:
        while not inflater.eof:
            if not left:
                left = view[at : at + STEP]
                at += len(left)
            step = inflater.decompress(left, min(STEP, most - len(found) + 1))
            if not step and not left:
                raise InvalidRequestError("the compressed body ends too early; send all of it")
            found += step
            left = inflater.unconsumed_tail
            if len(found) > most:
                raise PayloadTooLargeError(
                    f"Request exceeds the maximum allowed input size of {most} bytes once it is "
                    f"decompressed. Use --http-max-input-size to increase the limit."
                )
    except zlib.error:
        raise InvalidRequestError(
            "the body cannot be decompressed: it is neither gzip nor zlib, or it is damaged"
        ) from None
    behind = len(inflater.unused_data) + len(view) - at
    if behind:
        raise InvalidRequestError(
            f"{behind} bytes follow the end of the compressed body; send one stream, and nothing "
            f"behind it"
        )
    return found


# answers ------------------------------------------------------------------------------------------


class Wish(NamedTuple):
    """The coding of an answer, from so many bytes of tensors on. `text`: JSON alone."""

    coding: str
    least: int
    text: bool


def wish_of(accept: bytes) -> Wish | None:
    """What Accept-Encoding asks for; None: the plain bytes.

    The highest weight wins, of equal ones the first; "*" is all that is not named.
    """
    return _wish(accept) if len(accept) <= LONGEST_WISH else None


@lru_cache(1024)
def _wish(accept: bytes) -> Wish | None:
    weights: dict[str, float] = {}
    for part in accept.decode("latin-1").lower().split(","):
        name, _, rest = part.partition(";")
        weights.setdefault(name.strip(), _weight(rest))
    weights.pop("", None)
    rest_weight = weights.get("*", 0.0)
    known = [name for name in (*weights, "identity") if name in (*WINDOWS, "identity")]
    known += [name for name in WINDOWS if name not in weights and "*" in weights]
    best, most = "identity", 0.0
    for name in known:
        weight = weights.get(name, rest_weight)
        if weight > most:
            best, most = name, weight
    if best == "identity":
        return None
    if weights.get("identity", 1.0) == 0.0:
        return Wish(best, 0, text=False)
    asked = len(weights) == 1 or b";" in accept
    return Wish(best, LEAST, text=False) if asked else Wish(best, LEAST_UNASKED, text=True)


def _weight(params: str) -> float:
    """Of ";q=": 1 where it is not there, 0 where it is none."""
    for param in params.split(";"):
        key, _, value = param.partition("=")
        if key.strip() == "q":
            try:
                found = float(value.strip())
            except ValueError:
                return 0.0
            return found if 0.0 <= found <= 1.0 else 0.0
    return 1.0


def deflated(buffers: Sequence[Buffer], coding: str) -> bytes:
    """All of them as one stream."""
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, WINDOWS[coding])
    parts: list[bytes] = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        parts += [deflater.compress(view[i : i + STEP]) for i in range(0, len(view), STEP)]
    return b"".join([*parts, deflater.flush()])
