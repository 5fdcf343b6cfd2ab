"""Waits until the server is ready, then prints what to try. `make run` starts it beside the server.

    python examples/when_ready.py http://127.0.0.1:8000

Ends without a word when its parent, which becomes the server, goes first.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import urllib.request

TRY = """
Model Depot is ready. In another terminal, from this folder:

  curl -s {url}/v1/models/status
  curl -s {url}/v2/models/digits/infer -d @examples/digit.json
  curl -s {url}/v2/models/shout/infer -d @examples/text.json
  curl -s {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "writer", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'

Drop another model into the repository; it is served about a second later:

  cp -r examples/models/digits examples/models/numbers
  curl -s {url}/v2/models/numbers/infer -d @examples/digit.json
  rm -r examples/models/numbers

The whole story is in README.md. Ctrl-C stops the server.
"""


def main(url: str) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        # Not there yet, or there and still loading (HTTPError): both are asked again.
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2).close()
            print(TRY.format(url=url), flush=True)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1].rstrip("/"))
