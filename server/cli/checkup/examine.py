"""All checks, at once, each with the same limit of time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from server.cli.checkup import doors, encryption, folders, frameworks, machine
from server.cli.checkup.finding import Finding, fail
from server.cli.checkup.probing import probe
from server.cli.checkup.versions import versions
from server.settings import Settings

LEFT_S = 3.0  # of the limit, for ending the processes that did not answer
Check = Callable[[], list[Finding]]


def checks(settings: Settings, within_s: float) -> list[tuple[str, Check]]:
    """In the order in which they are shown."""
    return [
        ("versions", versions),
        ("repository", partial(folders.repository, settings)),
        ("watch", partial(folders.watching, settings)),
        ("state", partial(folders.state, settings)),
        ("port", partial(doors.ports, settings)),
        ("keys", partial(doors.keys, settings)),
        ("tls", partial(encryption.encryption, settings)),
        ("memory", partial(machine.memory, settings)),
        ("cores", machine.cores),
        ("files", machine.files),
        ("shared memory", machine.shared_memory),
        ("clock", machine.clock),
        ("gpu", partial(_frameworks, settings, within_s)),
    ]


def _frameworks(settings: Settings, within_s: float) -> list[Finding]:
    probes = probe(frameworks.SUBJECTS, max(within_s - LEFT_S, within_s / 2))
    return frameworks.frameworks(settings, probes, os.environ)


def examine(every: Sequence[tuple[str, Check]], within_s: float) -> list[Finding]:
    """What they found, in their order. One that hangs or breaks is a failure of its own name."""
    found: dict[str, list[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = check()
        except OSError as error:
            said = f"{error.filename or 'it'}: {error.strerror or error}"
            found[name] = [fail(name, said, f"let user id {os.geteuid()} look at it")]
        except Exception as error:  # noqa: BLE001 - the others' findings are worth showing
            found[name] = [fail(name, f"the check itself failed: {error!r}", "please report this")]

    # Daemons: a thread that hangs in a dead mount must not keep the command from ending.
    threads = [threading.Thread(target=run, args=each, daemon=True) for each in every]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    hung = "it hangs: is a disk or mount there that does not answer?"
    return [
        one
        for name, _ in every
        for one in found.get(name) or [fail(name, f"no answer within {within_s:g} s", hung)]
    ]
