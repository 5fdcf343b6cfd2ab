"""How near texts are to each other, by a server's vectors.

    python examples/minilm/near.py http://127.0.0.1:8000 "A man eats." "He has a meal." "A cello."

Prints the cosine of the first text with each of the others. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
import urllib.request


def main(url: str, *texts: str) -> None:
    asked = json.dumps({"model": "minilm", "input": texts}).encode()
    request = urllib.request.Request(
        f"{url}/v1/embeddings", asked, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        first, *others = [found["embedding"] for found in json.load(answer)["data"]]
    for text, other in zip(texts[1:], others, strict=True):  # they have length 1
        print(f"{sum(a * b for a, b in zip(first, other, strict=True)):6.3f}  {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
