"""Thousands of connections that ask all sorts of things, in a process of their own.

    python -m tests.e2e.mix URL CONNECTIONS TURNS SEED

All connections are opened, and each has had an answer, before stdout says "connected"; a line on
stdin then starts the mix: TURNS in all, drawn by SEED. They stay open until everybody is done, but
for those that break off on purpose and come back. stdout then gets one `Mixed` as JSON.
"""

from __future__ import annotations

import asyncio
import random
import resource
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from tests.e2e import questions
from tests.e2e.questions import Answer, Question, Stamp

LIMIT = 2**22  # bytes that a reader keeps before it lets the socket wait
AT_ONCE = 100  # connections that are being opened
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing is a reset
MOST_WRONG = 20  # that are told
PATIENCE_S = 100.0  # for one turn
MANY_FILES = 200  # that the process needs besides its connections

COMMON = {  # how often, beside each other
    questions.tiny_binary: 9,
    questions.tiny_json: 5,
    questions.unknown_model: 1,
    questions.wrong_shape: 1,
}
PAIRS, BROKEN = 0.12, 0.1  # shares of all turns
# Large questions come from few connections, so that no luck brings more of them together: of those
# whose number leaves the rest `at` by `every`, half of what they ask.
LARGE = (
    (250, 0, questions.huge_binary),
    (100, 1, questions.long_json),
    (25, 2, questions.medium_binary),
)


class Mixed(msgspec.Struct):
    """right      by kind: answers that were as they should be
    success    the same by model; without those that were to be refused, which are in `refused`
    noticed    broken off in the middle, and counted by the server: as canceled, or as a success
    unnoticed  the same, but reset: the server may not have seen a byte of it
    wrong      what is not as it should be
    """

    right: dict[str, int] = msgspec.field(default_factory=dict)
    success: dict[str, int] = msgspec.field(default_factory=dict)
    refused: int = 0
    noticed: int = 0
    unnoticed: int = 0
    wrong: list[str] = msgspec.field(default_factory=list)

    def note(self, question: Question) -> None:
        self.right[question.kind] = self.right.get(question.kind, 0) + 1
        if question.model:
            self.success[question.model] = self.success.get(question.model, 0) + 1
        else:
            self.refused += 1

    def complain(self, what: str) -> None:
        if len(self.wrong) < MOST_WRONG:
            self.wrong.append(what)


class Mixing:
    """The process. `mixed` once it has ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def begin(self) -> Mixed:
        out, _ = await self._process.communicate(b"go\n")
        assert self._process.returncode == 0
        return msgspec.json.decode(out, type=Mixed)


@asynccontextmanager
async def mixing(url: str, connections: int, turns: int, seed: int) -> AsyncIterator[Mixing]:
    """All connections are open when the block begins."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.e2e.mix", url, str(connections), str(turns), str(seed)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"connected\n"
        yield Mixing(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# the process -------------------------------------------------------------------------------------


class Client:
    """One connection after the other. `number` and how often it has asked make its stamps."""

    def __init__(self, address: tuple[str, int], number: int, seed: int, mixed: Mixed) -> None:
        self._address = address
        self._number = number
        self._seed = seed
        self._dice = random.Random(seed * 1_000_003 + number)
        self._mixed = mixed
        self._asked = 0
        self._large = [make for every, at, make in LARGE if number % every == at]
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(*self._address, limit=LIMIT)

    async def greet(self) -> None:
        await self._ask([questions.tiny_binary(self._dice, self._stamp())])

    def close(self) -> None:
        self._writer.close()

    async def turn(self) -> None:
        """Whatever comes of it, there is a connection afterwards."""
        chance = self._dice.random()
        try:
            async with asyncio.timeout(PATIENCE_S):
                if chance < BROKEN and self._asked > 1:
                    await self._break_off()
                elif chance < BROKEN + PAIRS:
                    await self._ask([self._question(), self._question()])
                else:
                    await self._ask([self._question()])
        except (OSError, ValueError, KeyError, EOFError, TimeoutError) as error:
            self._mixed.complain(f"connection {self._number}: {type(error).__name__}: {error}")
            self._writer.transport.abort()
            await self.open()

    def _stamp(self) -> Stamp:
        self._asked += 1
        return self._number, self._asked, self._dice.randrange(4096), self._seed

    def _question(self) -> Question:
        stamp, dice = self._stamp(), self._dice
        if self._large and (self._asked <= 2 or dice.random() < 0.5):
            return self._large[0](dice, stamp)
        (make,) = dice.choices(list(COMMON), list(COMMON.values()))
        return make(dice, stamp)

    async def _ask(self, asked: Sequence[Question]) -> None:
        """All at once; the answers come one after the other."""
        for question in asked:
            self._send(question)
        for question in asked:
            answer = await self._answer()
            fault = question.fault(answer)
            if fault:
                self._mixed.complain(f"{question.kind}, {question.model or 'refused'}: {fault}")
            else:
                self._mixed.note(question)
        if answer.headers.get(b"connection") == b"close":
            self._writer.close()
            await self.open()

    def _send(self, question: Question) -> None:
        """Without waiting: the server may want its answers read before it reads on."""
        self._writer.writelines((question.head, *question.body))

    async def _answer(self) -> Answer:
        top = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = top[:-4].split(b"\r\n")
        fields = (line.split(b": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in fields}
        body = await self._reader.readexactly(int(headers[b"content-length"]))
        return Answer(int(first.split()[1]), headers, body)

    async def _break_off(self) -> None:
        question = self._question()
        while not question.model:
            question = self._question()
        reset = self._dice.random() < 0.5
        where = self._dice.choice((self._in_the_head, self._in_the_body, self._after_it))
        begun = await where(question)
        if reset:
            sock: socket.socket = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._writer.transport.abort()
            self._mixed.unnoticed += begun
        else:
            self._writer.close()
            self._mixed.noticed += begun
        await self.open()

    async def _in_the_head(self, question: Question) -> bool:
        self._writer.write(question.head[: self._dice.randrange(1, len(question.head))])
        return False

    async def _in_the_body(self, question: Question) -> bool:
        sent = self._dice.randrange(question.length)
        self._writer.write(question.head)
        self._writer.write(b"".join(question.body)[:sent])
        return True

    async def _after_it(self, question: Question) -> bool:
        """At once, or when the answer has begun."""
        self._send(question)
        if self._dice.random() < 0.5:
            await self._reader.read(1)
        return True


async def run(url: str, connections: int, turns: int, seed: int) -> Mixed:
    host, port = url.removeprefix("http://").split(":")
    mixed = Mixed()
    clients = [Client((host, int(port)), n, seed, mixed) for n in range(connections)]
    door = asyncio.Semaphore(AT_ONCE)

    async def come_in(client: Client) -> None:
        async with door:
            await client.open()
        await client.greet()

    await asyncio.gather(*map(come_in, clients))
    sys.stdout.write("connected\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    left = iter(range(turns))

    async def take_turns(client: Client) -> None:
        for _ in left:
            await client.turn()

    await asyncio.gather(*map(take_turns, clients))
    for client in clients:
        client.close()
    return mixed


def main() -> None:
    import uvloop

    url, *numbers = sys.argv[1:]
    connections, turns, seed = map(int, numbers)
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(allowed, connections + MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, most), most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        mixed = runner.run(run(url, connections, turns, seed))
    sys.stdout.buffer.write(msgspec.json.encode(mixed))


if __name__ == "__main__":
    main()
