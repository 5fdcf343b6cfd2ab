"""Model Depot beside its limits and its peers, in one run: `make bench`.

    python -m bench.compare [--quick] [--rounds 4] [--seconds 2] [--models tiny,large,slow]
                            [--connections 1,16,64] [--only WORDS] [--peers | --no-peers]
                            [--json PATH] [--chart PATH] [--compare OLD.json]

Needs the development environment and wrk; peers need `make bench-peers`, which --peers does by
itself. All servers are up all the time; one at a time is under load, and what still uses the cores
when nobody asks is stopped meanwhile. Every round asks everybody, in an order of its own. Before each
turn one answer is held against numpy's, and an answer that is not 200 makes the turn worthless. A
peer that is not there, or does not start, is left out with the reason.

Exit 1: an answer of ours was wrong or missing, or, with --compare, a ratio of ours has fallen by more
than a tenth and beyond the spread of the rounds. An aim that was missed is told, no more.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import clients, depot, environment, ratios, report
from bench.contenders import (
    HERE,
    OURS,
    STARTERS,
    Contender,
    Place,
    Server,
    add_models,
    wanted,
)
from bench.dialects import Message
from bench.figures import table, write
from bench.programs import NotStartedError, Program, asleep, at_rest, idle_share
from bench.ratios import Key, Sample
from bench.subjects import SUBJECTS

OUT = HERE / "out"
IDLE_S = 1.0
WARM_UP_S = 1


@dataclass(frozen=True)
class Turn:
    """One contender with one model over so many connections."""

    contender: Contender
    subject: str
    connections: int

    @property
    def key(self) -> Key:
        return self.subject, self.contender.name, self.connections


@dataclass
class Stage:
    """Everything that runs."""

    place: Place
    servers: dict[str, Server] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)  # of a core
    restless: frozenset[str] = frozenset()  # servers that are stopped while others are measured
    left_out: dict[str, str] = field(default_factory=dict)  # server -> why
    bodies: dict[tuple[str, str], tuple[Message, Path]] = field(default_factory=dict)

    def url(self, turn: Turn) -> str:
        return self.servers[turn.contender.server].url + turn.contender.paths[turn.subject]

    def body(self, turn: Turn) -> tuple[Message, Path]:
        """What is posted, and the file it lies in."""
        dialect = turn.contender.dialect
        which = (turn.subject, dialect.name)
        if which not in self.bodies:
            message = dialect.ask(SUBJECTS[turn.subject].question())
            path = self.place.home / f"body-{len(self.bodies)}"
            path.write_bytes(message.body)
            self.bodies[which] = message, path
        return self.bodies[which]

    @contextmanager
    def alone(self, server: str) -> Iterator[None]:
        """Without those that use the cores when nobody asks them."""
        others = [pid for s in self.restless - {server} for pid in self.servers[s].tree()]
        with asleep(others):
            yield


@contextmanager
def staged(contenders: Sequence[Contender], names: tuple[str, ...]) -> Iterator[Stage]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        here = Place(home, home / "models", names)
        add_models(here.repo, names)
        stage = Stage(here)
        for name in dict.fromkeys(c.server for c in contenders if set(c.paths) & set(names)):
            report.progress(f"starting {name}")
            try:
                stage.servers[name] = stack.enter_context(STARTERS[name](here))
            except NotStartedError as error:
                stage.left_out[name] = str(error)
        for name, server in stage.servers.items():
            stage.idle[name] = idle_share(server.tree(), IDLE_S)
        stage.restless = frozenset(n for n, share in stage.idle.items() if share > report.RESTLESS)
        yield stage


def turns_of(
    contenders: Sequence[Contender], stage: Stage, connections: Sequence[int]
) -> list[Turn]:
    return [
        Turn(contender, subject, count)
        for subject in stage.place.names
        for count in (0, *connections)
        for contender in contenders
        if contender.server in stage.servers
        and subject in contender.paths
        and contender.least <= count <= contender.most
    ]


# measuring ----------------------------------------------------------------------------------------


def call(program: Program, subject: str, batch: str, seconds: int) -> Sample:
    """What the model can do at most. A batch counts as the requests in it."""
    assert program.process.stdin is not None
    program.process.stdin.write(f"{subject} {batch} {seconds}\n")
    program.process.stdin.flush()
    took: dict[str, float] = json.loads(program.line())
    return Sample(
        rate=took["rows"] / took["seconds"],
        p50_ms=1000 * took["p50_s"],
        p99_ms=1000 * took["p99_s"],
        cpu_us=1e6 * took["cpu_s"] / took["rows"],
    )


def take(stage: Stage, turn: Turn, seconds: int) -> Sample:
    server = stage.servers[turn.contender.server]
    if server.direct:
        batch = turn.contender.paths[turn.subject]
        return call(server.direct, turn.subject, batch, seconds)
    url = stage.url(turn)
    message, file = stage.body(turn)
    try:
        clients.verify(url, turn.contender.dialect, SUBJECTS[turn.subject])
    except (clients.WrongAnswerError, OSError) as error:
        print(f"\n{report.which(turn.key)}: {error}", file=sys.stderr)
        return Sample(0, 0, 0, 0, wrong={"verify": 1})
    before = depot.cpu_s(server.tree())
    found = clients.ask_for(url, message, file, turn.connections, seconds)
    cpu = depot.cpu_s(server.tree()) - before
    if turn.contender.server not in stage.restless:
        at_rest(server.tree())
    if found.wrong or not found.requests:
        wrong = found.wrong or {"no answer": 1}
        print(f"\n{report.which(turn.key)}: {dict(wrong)}", file=sys.stderr)
        return Sample(0, 0, 0, 0, wrong=wrong)
    return Sample(
        rate=found.requests / found.seconds,
        p50_ms=1000 * found.p50_s,
        p99_ms=1000 * found.p99_s,
        cpu_us=1e6 * cpu / found.requests,
        client_us=1e6 * found.client_cpu_s / found.requests,
    )


def one_round(stage: Stage, turns: Sequence[Turn], seconds: int, seed: int) -> dict[Key, Sample]:
    """Everybody once. The contenders of one model and so many connections follow each other, so that
    what is divided was measured within seconds; their order, and that of the groups, is shuffled."""
    shuffle = random.Random(seed).shuffle
    groups: dict[tuple[str, int], list[Turn]] = {}
    for turn in turns:
        groups.setdefault((turn.subject, turn.connections), []).append(turn)
    order = list(groups)
    shuffle(order)
    found: dict[Key, Sample] = {}
    for group in order:
        shuffle(groups[group])
        for turn in groups[group]:
            with stage.alone(turn.contender.server):
                found[turn.key] = take(stage, turn, seconds)
    return found


def warm_up(stage: Stage, turns: Sequence[Turn]) -> None:
    """Caches, arenas and pools are filled before anything counts."""
    seen = set()
    for turn in turns:
        what = (turn.contender.name, turn.subject)
        if what not in seen:
            seen.add(what)
            with stage.alone(turn.contender.server):
                take(stage, Turn(turn.contender, turn.subject, 16), WARM_UP_S)


def compared(stage: Stage, turns: Sequence[Turn], args: argparse.Namespace) -> ratios.Rounds:
    if not args.quick:
        warm_up(stage, turns)
    rounds: list[Mapping[Key, Sample]] = []
    for number in range(args.rounds):
        began = time.perf_counter()
        rounds.append(one_round(stage, turns, args.seconds, args.seed + number))
        took = time.perf_counter() - began
        report.progress(f"round {number + 1} of {args.rounds}: {took:.0f} s")
    return [{turn.key: found[turn.key] for turn in turns} for found in rounds]


# the whole ----------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help="default 4")
    parser.add_argument("--seconds", type=int, help="of each turn, whole ones; default 2")
    parser.add_argument("--models", type=_words, default=list(SUBJECTS))
    parser.add_argument("--connections", type=_numbers, help="default 1,16,64")
    parser.add_argument("--only", type=_words, default=[], help="contenders with these words")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=None,
                        help="install them first; without either, those that are installed")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s, c=16: a first look")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=OUT / "compare.json")
    parser.add_argument("--chart", type=Path, default=OUT / "compare.svg")
    parser.add_argument("--compare", type=Path, help="the JSON of an earlier run")
    args = parser.parse_args()
    if unknown := [name for name in args.models if name not in SUBJECTS]:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    rounds, seconds, connections = (2, 1, [16]) if args.quick else (4, 2, [1, 16, 64])
    args.rounds = args.rounds or rounds
    args.seconds = args.seconds or seconds
    args.connections = args.connections or connections
    return args


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def main() -> None:
    args = arguments()
    clients.found_wrk()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # nothing of it stays behind
    old: Any = json.loads(args.compare.read_text()) if args.compare else None
    if args.peers:
        environment.make()
    contenders = wanted(args.only, args.peers is not False)
    names = tuple(name for name in SUBJECTS if name in args.models)
    began = time.perf_counter()
    with staged(contenders, names) as stage:
        turns = turns_of(contenders, stage, args.connections)
        rounds = compared(stage, turns, args)
        memory = {n: sum(map(depot.pss, s.tree())) for n, s in stage.servers.items()}
    cells = ratios.cells_of(rounds)
    rows = ratios.aims(rounds)
    print(report.tables(cells, names))
    print(report.servers(contenders, memory, stage.idle, stage.left_out))
    title = f"{args.rounds} rounds, {args.seconds} s a turn, {time.perf_counter() - began:.0f} s"
    if rows:
        print(table(f"aims: {title}", rows))
    found = ratios.as_json(cells)
    write(
        args.json, title, rows, cells=found, memory_bytes=memory, idle_cores=stage.idle,
        left_out=stage.left_out, versions=environment.versions(),
    )  # fmt: skip
    args.chart.parent.mkdir(parents=True, exist_ok=True)
    args.chart.write_text(report.picture(found, names))
    wrong = [c for c in cells if c.wrong and c.contender.startswith(OURS)]
    for cell in wrong:
        print(f"WRONG ANSWERS: {cell.subject}, c={cell.connections}: {cell.contender}")
    worse = ratios.regressions(old["cells"], found) if old else []
    for which, was, now in worse:
        print(f"WORSE: {which}: {was:.2f} of the limit before, {now:.2f} now")
    sys.exit(bool(wrong or worse))


if __name__ == "__main__":
    main()
