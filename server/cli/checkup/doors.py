"""The ports, who listens there already, and who may come in."""

from __future__ import annotations

import errno
import json
import os
import socket
import ssl
import stat
import time
from typing import NamedTuple

from repository.errors import ConfigError
from server.binding import check_bind
from server.cli.checkup.encryption import context_of
from server.cli.checkup.finding import Finding, fail, ok, warn
from server.settings import Settings

WITHIN_S = 2.0
HEALTH = "/health"
ANYWHERE = {
    "": "127.0.0.1",
    "0.0.0.0": "127.0.0.1",
    "::": "::1",
}  # where to ask for such an address


class Told(NamedTuple):
    status: int
    body: bytes
    took_s: float


def reach(host: str) -> str:
    """Where a server that listens on `host` answers on this machine."""
    plain = host.strip("[]")
    return ANYWHERE.get(plain, plain)


def ask(
    host: str,
    port: int,
    path: str,
    within_s: float = WITHIN_S,
    tls: ssl.SSLContext | None = None,
) -> Told:
    """GET. Raises OSError, TimeoutError among them, and ValueError for what is no HTTP."""
    import http.client

    began = time.monotonic()
    connection = (
        http.client.HTTPConnection(host, port, timeout=within_s)
        if tls is None
        else http.client.HTTPSConnection(host, port, timeout=within_s, context=tls)
    )
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        return Told(answer.status, answer.read(65_536), time.monotonic() - began)
    except http.client.HTTPException as error:
        raise ValueError(f"what listens there speaks no HTTP ({error!r})") from error
    finally:
        connection.close()


def ports(settings: Settings, within_s: float = WITHIN_S) -> list[Finding]:
    """Each is free, or our own server has it. `within_s`: for whoever has it to say who he is."""
    wanted = [("port", settings.port)]
    if settings.metrics_port is not None:
        wanted.append(("metrics port", settings.metrics_port))
    if settings.allow_grpc:
        wanted.append(("grpc port", settings.grpc_port))
    tls = context_of(settings)
    return [_port(name, settings.host, port, within_s, tls) for name, port in wanted]


def _port(name: str, host: str, port: int, within_s: float, tls: ssl.SSLContext | None) -> Finding:
    flag = f"--{name.replace(' ', '-')}"
    if port == 0:
        return ok(name, "any free one")
    try:
        _try(host, port)
    except socket.gaierror as error:
        return fail(name, f"cannot find '{host}': {error.strerror}", "mend --host")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _taken(name, host, port, within_s, tls)
        why = os.strerror(error.errno or 0)
        todo = {
            errno.EACCES: f"ports below 1024 are root's: choose another with {flag}",
            errno.EADDRNOTAVAIL: "no interface of this machine has that address: mend --host",
        }.get(error.errno or 0, f"choose another with {flag}")
        return fail(name, f"cannot listen on {host}:{port}: {why}", todo)
    return ok(name, f"{host}:{port} is free")


def _try(host: str, port: int) -> None:
    """Listens for an instant, as the server would."""
    family, _, _, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1)


def _taken(name: str, host: str, port: int, within_s: float, tls: ssl.SSLContext | None) -> Finding:
    said, who = ours(host, port, within_s, tls) if name != "grpc port" else None, listener(port)
    if said is not None:
        return ok(name, f"{host}:{port}: {said} serves there already{who}")
    if name != "port":  # its page has no word of who serves it
        return warn(name, f"{host}:{port} is taken{who}", "fine where our own server runs already")
    todo = "stop what listens there, or choose another with --port"
    return fail(name, f"{host}:{port} is taken{who}", todo)


def ours(host: str, port: int, within_s: float, tls: ssl.SSLContext | None = None) -> str | None:
    """ "modeldepot 0.1.0 (healthy)", where it is a Model Depot that has the port."""
    try:
        said = json.loads(ask(reach(host), port, HEALTH, within_s, tls).body)
        info = said["backend"]["info"]
        return f"{info['name']} {info['version']} ({said['status']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def listener(port: int) -> str:
    """ " (nginx, pid 7)"; "" where the kernel does not tell us."""
    import psutil

    try:
        for found in psutil.net_connections("tcp"):
            heard = getattr(found.laddr, "port", 0) if found.status == psutil.CONN_LISTEN else 0
            if heard == port and found.pid:
                return f" ({psutil.Process(found.pid).name()}, pid {found.pid})"
    except (psutil.Error, OSError):
        pass
    return ""


def keys(settings: Settings) -> list[Finding]:
    """Who may call what, and whether others on this machine could read or change that."""
    from server.auth import Scope, read_keys

    name, path = "keys", settings.api_keys
    try:
        check_bind(settings)
    except ConfigError:
        said = (
            f"the server will refuse to listen on {settings.host}: nobody would be asked for a key"
        )
        todo = (
            "give --api-keys FILE (MODELDEPOT_API_KEYS; see `modeldepot keys new`), or --insecure "
            "(MODELDEPOT_INSECURE=1) if something in front asks for keys"
        )
        return [fail(name, said, todo)]
    if path is None:
        if settings.tls_client_ca is not None:
            return [ok(name, "nobody is asked for a key, but everybody for a certificate")]
        if settings.insecure:
            said = f"nobody is asked for a key on {settings.host} (--insecure)"
            return [warn(name, said, "make sure that something in front asks for keys")]
        return [
            ok(name, f"nobody is asked for a key, and only this machine reaches {settings.host}")
        ]
    try:
        found = read_keys(path)
        mode = path.stat().st_mode
    except ConfigError as error:
        return [
            fail(name, f"'{path}': {error.message}", f"mend it; user id {os.geteuid()} reads it")
        ]
    said = f"{path}: {len(found)} of them"
    if mode & (stat.S_IWOTH | stat.S_IWGRP):
        return [fail(name, f"{said}; others may change it ({mode & 0o777:o})", f"chmod 600 {path}")]
    if mode & stat.S_IROTH:
        return [
            warn(name, f"{said}; everybody may read it ({mode & 0o777:o})", f"chmod 600 {path}")
        ]
    if not any(Scope.ADMIN in key.scopes for key in found):
        todo = "make one: modeldepot keys new --scope admin"
        return [warn(name, f"{said}, none with the scope admin: nobody may load or unload", todo)]
    return [ok(name, said)]
