"""The least that a server can do: one that answers everything with the same bytes.

python -m bench.echo     prints its port, then serves until it is ended
"""

from __future__ import annotations

import socket
from typing import Any

import uvicorn

BODY = b'{"status":"healthy"}'
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-length", b"%d" % len(BODY))],
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": BODY})


def main() -> None:
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", lifespan="off", access_log=False, log_config=None
    )
    with socket.create_server(("127.0.0.1", 0)) as sock:
        print(sock.getsockname()[1], flush=True)
        uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main()
