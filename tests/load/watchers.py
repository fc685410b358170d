"""A thousand WebSockets on one endpoint process: the delay of a change, and what they leave behind.

python -m tests.load.watchers [--clients 1000] [--executions 10] [--seconds 20] [--rate 10]
[--connects 10000]. Prints a table; exit code 1 if a client missed a revision or got one twice or
out of order, if the organization was subscribed to more than once, if a slow client was not closed
with its code or cost much memory, or if something stayed behind.

The clients are in a separate process, so that the endpoint has a core. Times are of one clock.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import multiprocessing
import os
import resource
import signal
import socket
import statistics
import struct
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import uvloop

from producers.client import TagProducer
from producers.contract.channels import positions_channel
from producers.contract.messages import TagBatch, add, register_execution
from producers.redis_client import open_redis
from tests.support.memory import max_resident, resident
from tests.support.script_stack import script_stack
from tests.support.waiting import eventually
from worker.local.stack import Stack

STORED: Final = 3
"""Events that each execution has before it is watched: a client that has these is connected."""
ROUNDS: Final = 5
SLOW: Final = 10
AT_A_TIME: Final = 50
FIRST_CONNECTS: Final = 1000
TOO_SLOW: Final = 1013
MOST_MB_FOR_A_SLOW_CLIENT: Final = 5.0
MOST_GROWTH: Final = 0.1
LARGE_METADATA: Final = "x" * 8000
DEADLINE: Final = 30.0


# --- A client: frames, pings and no more ---------------------------------------------------------


def handshake(execution: UUID, token: str | None) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET /task-tags/changes?flow_execution_id={execution} HTTP/1.1",
        "Host: 127.0.0.1",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        *([f"Authorization: Bearer {token}"] if token else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a frame of a client, masked with zeros: that changes nothing of a short payload."""
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + bytes(4) + payload


class Frames:
    """Takes an answer to a handshake apart, and the frames behind it."""

    def __init__(self) -> None:
        self.opened = False
        self._rest = b""

    def take(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield complete frames: opcodes, payloads. Raises `ConnectionError` if it was refused."""
        data = self._rest + data
        begin = 0 if self.opened else self._head(data)
        while found := self._frame(data, begin):
            opcode, payload, begin = found
            yield opcode, payload
        self._rest = data[begin:]

    def _head(self, data: bytes) -> int:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return 0
        if not data.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(f"refused: {data[:200]!r}")
        self.opened = True
        return end + 4

    def _frame(self, data: bytes, begin: int) -> tuple[int, bytes, int] | None:
        if not self.opened or len(data) < begin + 2:
            return None
        length, start = data[begin + 1], begin + 2
        if length >= 126:
            start += 2 if length == 126 else 8
            length = int.from_bytes(data[begin + 2 : start], "big")
        if len(data) < start + length:
            return None
        return data[begin] & 0x0F, data[start : start + length], start + length


TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


def revision_of(event: bytes) -> int:
    """Return the revision of an event; 0 if it is an error."""
    return int(event.partition(b'"revision":')[2].partition(b",")[0] or 0)


class Client(asyncio.Protocol):
    """One that watches: it notes which revisions came and when."""

    def __init__(self, request: bytes, on_frame: Callable[[], None] = lambda: None) -> None:
        self.revisions = array("q")
        self.times = array("d")
        self.code: int | None = None
        """The code with which it was closed."""
        self.lost = False
        self._request = request
        self._on_frame = on_frame
        self._frames = Frames()
        self._waiter: asyncio.Future[None] | None = None
        self._transport: Any = None

    @property
    def opened(self) -> bool:
        return self._frames.opened

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        for opcode, payload in self._frames.take(data):
            if opcode == TEXT:
                self.revisions.append(revision_of(payload))
                self.times.append(now)
                self._on_frame()
            elif opcode == PING:
                self._transport.write(frame(PONG, payload))
            elif opcode == CLOSE:
                self.code = int.from_bytes(payload[:2], "big")
        self._wake()

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait for a condition.

        Raises `TimeoutError`, or `ConnectionError` if the connection is lost before.
        """
        async with asyncio.timeout(DEADLINE):
            while not reached():
                if self.lost:
                    raise ConnectionError(f"lost with the code {self.code}")
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter

    async def has_received(self, count: int) -> None:
        await self.until(lambda: len(self.revisions) >= count)

    async def close(self) -> None:
        """Close as the protocol wants it."""
        self._transport.write(frame(CLOSE, (1000).to_bytes(2, "big")))
        await self.until(lambda: self.lost)

    def hang_up(self) -> None:
        """End the TCP connection without a word."""
        self._transport.close()

    def reset(self) -> None:
        """Break the TCP connection."""
        linger = struct.pack("ii", 1, 0)
        self._transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        self._transport.abort()


# --- The process of the clients ------------------------------------------------------------------


class Received(NamedTuple):
    """What one client got."""

    execution: int
    """Its place among those that are watched."""
    revisions: Sequence[int]
    times: Sequence[float]
    code: int | None


class Crowd:
    """All clients. Its methods are called from the other process."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token
        self._clients: list[Client] = []
        self._executions = 1
        self._frames = 0

    async def obey(self, pipe: Connection) -> None:
        """Do what is asked, until nobody can ask any more."""
        gc.disable()
        while True:
            try:
                name, arguments = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            pipe.send(await getattr(self, name)(*arguments))

    async def open(self, executions: list[UUID], count: int) -> float:
        """Connect clients to the executions in turn; return the seconds until all are connected."""
        self._executions, self._frames = len(executions), 0
        begin = time.monotonic()
        opening = asyncio.Semaphore(AT_A_TIME)

        async def one(number: int) -> Client:
            async with opening:
                client = await self._connect(executions[number % len(executions)], self._count)
                await client.has_received(STORED)
                return client

        self._clients = await asyncio.gather(*map(one, range(count)))
        return time.monotonic() - begin

    async def receive(self, frames: int, seconds: float) -> int:
        """Wait for so many frames, and briefly for more that must not come; return the number."""
        deadline = time.monotonic() + seconds
        while self._frames < frames and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        return self._frames

    async def leave(self) -> list[Received]:
        """Close all; return what each got."""
        received = [
            Received(number % self._executions, client.revisions, client.times, client.code)
            for number, client in enumerate(self._clients)
        ]
        await asyncio.gather(*(client.close() for client in self._clients if not client.lost))
        self._clients = []
        gc.collect()
        return received

    async def visit(self, executions: list[UUID], count: int) -> None:
        """Connect and disconnect so many times, in each of the ways in turn."""
        ways = (self._closes, self._is_reset, self._has_no_token, self._hangs_up, self._runs_away)
        numbers = iter(range(count))

        async def one_after_another() -> None:
            for number in numbers:
                way = ways[number % len(ways)]
                await way(executions[number // len(ways) % len(executions)])

        await asyncio.gather(*(one_after_another() for _ in range(AT_A_TIME)))
        gc.collect()

    async def _closes(self, execution: UUID) -> None:
        client = await self._connect(execution)
        await client.has_received(1)
        await client.close()
        assert client.code == 1000, client.code

    async def _is_reset(self, execution: UUID) -> None:
        client = await self._connect(execution)
        await client.until(lambda: client.opened)
        client.reset()

    async def _has_no_token(self, execution: UUID) -> None:
        client = await self._connect(execution, token=None)
        await client.until(lambda: client.opened)
        client.reset()

    async def _hangs_up(self, execution: UUID) -> None:
        client = await self._connect(execution)
        await client.has_received(STORED)
        client.hang_up()

    async def _runs_away(self, execution: UUID) -> None:
        (await self._connect(execution)).reset()

    async def _connect(
        self, execution: UUID, on_frame: Callable[[], None] = lambda: None, token: str | None = ""
    ) -> Client:
        request = handshake(execution, self._token if token == "" else token)
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(
            lambda: Client(request, on_frame), "127.0.0.1", self._port
        )
        return client

    def _count(self) -> None:
        self._frames += 1


def live(pipe: Connection, port: int, token: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process gets it too, and hangs up
    uvloop.run(Crowd(port, token).obey(pipe))


Ask = Callable[..., Any]
"""Calls a method of the crowd: its name and its arguments."""


@contextmanager
def crowd(stack: Stack) -> Iterator[Ask]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=live, args=(theirs, port_of(stack), stack.token), daemon=True)
    process.start()
    theirs.close()

    def ask(name: str, *arguments: Any) -> Any:
        ours.send((name, arguments))
        return ours.recv()

    try:
        yield ask
    finally:
        ours.close()
        process.join(10)


def port_of(stack: Stack) -> int:
    return int(stack.endpoint_url.rpartition(":")[2])


# --- The process of the endpoint -----------------------------------------------------------------


class Process:
    """What the kernel says of the endpoint."""

    def __init__(self, stack: Stack) -> None:
        running = stack.supervisor.running
        self._pid = next(process.pid for child, process in running if child.name == "endpoint")

    @property
    def megabytes(self) -> float:
        return resident(self._pid)

    @property
    def most_megabytes(self) -> float:
        """The most that it ever had."""
        return max_resident(self._pid)

    @property
    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/fd"))


def start_again(stack: Stack) -> Process:
    """Start the endpoint again: in memory that was used before, a leak could hide."""
    child, process = next(each for each in stack.supervisor.running if each[0].name == "endpoint")
    process.terminate()
    process.wait()
    stack.supervisor.restart_ended(lambda _: None)
    eventually(child.ready, DEADLINE)
    return Process(stack)


# --- What is measured ----------------------------------------------------------------------------


@dataclass
class Run:
    """What all parts need, and what they find."""

    stack: Stack
    producer: TagProducer
    redis: Any
    ask: Ask
    clients: int
    rows: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    gaps: int = 0
    doubled: int = 0
    reordered: int = 0
    subscriptions: int = 0

    def execution(self) -> UUID:
        """Return a new execution, with a few events."""
        id = uuid4()
        self.producer.apply(register_execution(id))
        for number in range(STORED):
            self.producer.apply(small(id, f"stored {number}"))
        return id

    def channels(self) -> dict[str, int]:
        """Return the channels that announce changes and have subscribers, and how many of them."""
        channel = positions_channel(self.stack.organization_id)
        found = self.redis.pubsub_numsub(channel)
        return {name.decode(): count for name, count in found if count}

    def all_left(self) -> bool:
        return not self.channels()

    def check(self, received: Sequence[Received], last: Sequence[int]) -> None:
        """Each client got every revision of its execution once, in order."""
        for each in received:
            expected, different = set(range(1, last[each.execution] + 1)), set(each.revisions)
            pairs = zip(each.revisions, each.revisions[1:], strict=False)
            self.gaps += len(expected - different)
            self.doubled += len(each.revisions) - len(different)
            self.reordered += sum(after < before for before, after in pairs)
            if different - expected:
                self.faults.append(f"a client got the revisions {different - expected}")
            if each.code is not None:
                self.faults.append(f"a client was closed with {each.code}")


def small(execution: UUID, tag: str) -> TagBatch:
    return TagBatch(tags=[add(execution, "task", "type", tag, {"reviewer": "ada"})])


def under_load(run: Run, executions: list[UUID], seconds: float, rate: float) -> tuple[float, ...]:
    """All clients, spread over the executions while these change; return p50, p95, p99 in ms."""
    process = Process(run.stack)
    before = process.megabytes
    connected = run.ask("open", executions, run.clients)
    count_subscriptions(run)
    with_all, used = process.megabytes, process.processor_seconds
    begin = time.monotonic()
    sent = send(run, executions, seconds, rate)
    last = [STORED + len(times) for times in sent]
    run.ask("receive", sum(last[n % len(last)] for n in range(run.clients)), DEADLINE)
    used, elapsed = process.processor_seconds - used, time.monotonic() - begin
    received: list[Received] = run.ask("leave")
    eventually(run.all_left)
    run.check(received, last)
    times = [
        (at, at - sent[each.execution][revision - STORED - 1])
        for each in received
        for revision, at in zip(each.revisions, each.times, strict=True)
        if STORED < revision <= last[each.execution]
    ]
    cuts = statistics.quantiles((1e3 * latency for _, latency in times), n=100)
    figures = cuts[49], cuts[94], cuts[98]
    slowest = 1e3 * max(latency for _, latency in times)
    duration = max(at for at, _ in times) - begin
    run.rows += [
        (f"{run.clients:,} clients connect, until each watches", f"{connected:.1f} s"),
        ("Redis subscriptions", f"{run.subscriptions}"),
        (
            f"{rate:g} changes a second: from enqueue to a client, p50 / p95 / p99 / slowest",
            f"{' / '.join(f'{each:.0f}' for each in (*figures, slowest))} ms",
        ),
        ("frames delivered", f"{len(times):,}, {len(times) / duration:,.0f} a second"),
        (
            "processor time of the endpoint for that",
            f"{used:.1f} s, {used / elapsed:.0%} of a core",
        ),
        (
            "memory of the endpoint: without / with all / after them",
            f"{before:.0f} / {with_all:.0f} / {process.megabytes:.0f} MB",
        ),
    ]
    return figures


def count_subscriptions(run: Run) -> None:
    """One for the organization, however many watch its executions."""
    with suppress(AssertionError):
        eventually(run.channels, 2)
    run.subscriptions = sum(run.channels().values())
    if run.subscriptions != 1:
        run.faults.append(f"the organization has {run.subscriptions} subscriptions")


def send(run: Run, executions: list[UUID], seconds: float, rate: float) -> list[list[float]]:
    """Change the executions in turn; return when the changes of each were enqueued."""
    sent: list[list[float]] = [[] for _ in executions]
    begin = time.monotonic()
    for number in range(round(rate * seconds)):
        time.sleep(max(0, begin + number / rate - time.monotonic()))
        place = number % len(executions)
        sent[place].append(time.monotonic())
        run.producer.enqueue(small(executions[place], f"{number}"))
    return sent


def burst(run: Run) -> None:
    """All clients watch one execution: how long until the last of them has a change?"""
    execution = run.execution()
    run.ask("open", [execution], run.clients)
    sent = []
    for number in range(ROUNDS):
        sent.append(time.monotonic())
        run.producer.enqueue(small(execution, f"{number}"))
        run.ask("receive", run.clients * (STORED + number + 1), DEADLINE)
    received: list[Received] = run.ask("leave")
    eventually(run.all_left)
    run.check(received, [STORED + ROUNDS])
    delays = [
        max(
            (each.times[STORED + number] for each in received if len(each.times) > STORED + number),
            default=at + DEADLINE,
        )
        - at
        for number, at in enumerate(sent)
    ]
    run.rows.append(
        (
            f"one change for all {run.clients:,} clients: until the last has it, "
            f"median / slowest of {ROUNDS}",
            f"{1e3 * statistics.median(delays):.0f} / {1e3 * max(delays):.0f} ms",
        )
    )


def slow(run: Run, process: Process) -> None:
    """Clients that never read, while large events come, until they are let go; then they read."""
    execution = run.execution()
    tags = [add(execution, "task", "type", f"{number}", LARGE_METADATA) for number in range(100)]
    sockets = [socket.create_connection(("127.0.0.1", port_of(run.stack))) for _ in range(SLOW)]
    for each in sockets:
        each.sendall(handshake(execution, run.stack.token))
    eventually(run.channels)
    before = process.megabytes
    begin = time.monotonic()
    number = 0
    while not run.all_left() and time.monotonic() < begin + 2 * DEADLINE:
        operations = [tag.model_copy(update={"tag": f"{number} {tag.tag}"}) for tag in tags]
        run.producer.apply(TagBatch(tags=operations))
        number += 1
        time.sleep(0.1)
    seconds = time.monotonic() - begin
    codes = {read_to_the_end(run, each) for each in sockets}
    megabytes = (process.most_megabytes - before) / SLOW
    if codes != {TOO_SLOW}:
        run.faults.append(f"slow clients were closed with {codes} after {seconds:.0f} s")
    if megabytes > MOST_MB_FOR_A_SLOW_CLIENT:
        run.faults.append(f"a slow client cost {megabytes:.1f} MB")
    run.rows += [
        (
            f"{SLOW} clients that never read, {number} events of 0.8 MB: let go with",
            f"{', '.join(map(str, codes))} after {seconds:.1f} s",
        ),
        ("memory for each of them, at most", f"{megabytes:.1f} MB"),
    ]


def read_to_the_end(run: Run, opened: socket.socket) -> int | None:
    """Read what is there; return the code with which it ends, None if there is none."""
    opened.settimeout(DEADLINE)
    frames, code, revisions = Frames(), None, []
    with opened:
        try:
            while data := opened.recv(1 << 20):
                for opcode, payload in frames.take(data):
                    if opcode == TEXT:
                        revisions.append(revision_of(payload))
                    elif opcode == CLOSE:
                        code = int.from_bytes(payload[:2], "big")
        except OSError as error:
            run.faults.append(f"a slow client could not read to the end: {error!r}")
    run.check([Received(0, revisions, (), None)], [max(revisions, default=0)])
    return code


def come_and_go(run: Run, process: Process, executions: list[UUID], connects: int) -> int:
    """Connect and disconnect, in many ways; return how many subscriptions and files stay behind.

    One stays and watches something else: without any, the endpoint would close its connection to
    Redis and with it all subscriptions.
    """
    first = min(FIRST_CONNECTS, connects // 2)
    run.ask("open", [run.execution()], 1)
    run.ask("visit", executions, 2 * AT_A_TIME)  # so that there are connections to the servers
    settle(run, process)
    files = process.files
    run.ask("visit", executions, first)
    settle(run, process, files)
    megabytes = process.megabytes
    begin = time.monotonic()
    run.ask("visit", executions, connects - first)
    seconds = time.monotonic() - begin
    settle(run, process, files)
    growth = process.megabytes / megabytes - 1
    subscriptions, more_files = len(run.channels()) - 1, max(0, process.files - files)
    run.ask("leave")
    eventually(run.all_left)
    if subscriptions or more_files:
        run.faults.append(f"{subscriptions} subscriptions and {more_files} files stay behind")
    if growth > MOST_GROWTH:
        run.faults.append(f"the endpoint grew by {growth:.0%} after the first {first:,} connects")
    run.rows += [
        (
            f"{connects:,} connects and disconnects",
            f"{(connects - first) / seconds:,.0f} a second; "
            f"{subscriptions} subscriptions, {more_files} files left",
        ),
        (
            f"memory after the first {first:,} / after all",
            f"{megabytes:.1f} / {process.megabytes:.1f} MB ({growth:+.1%})",
        ),
    ]
    return subscriptions + more_files


def settle(run: Run, process: Process, files: int | None = None) -> None:
    """Wait until all but one have left, or for a while: what is left then is reported."""
    with suppress(AssertionError):
        eventually(
            lambda: len(run.channels()) == 1 and (files is None or process.files <= files), DEADLINE
        )


# --- All of it -----------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--executions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rate", type=float, default=10, help="changes a second, in all")
    parser.add_argument("--connects", type=int, default=10_000)
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the endpoint inherits it
    if most != resource.RLIM_INFINITY and most < arguments.clients + 200:
        parser.error(f"{most} open files are too few")
    with (
        script_stack(workers=1) as (_, stack),
        TagProducer(
            redis_url=stack.redis_url, organization_id=stack.organization_id, token=stack.token
        ) as producer,
        open_redis(stack.redis_url) as redis,
        crowd(stack) as ask,
    ):
        run = Run(stack, producer, redis, ask, arguments.clients)
        executions = [run.execution() for _ in range(arguments.executions)]
        p50, _, p99 = under_load(run, executions, arguments.seconds, arguments.rate)
        burst(run)
        process = start_again(stack)
        leaked = come_and_go(run, process, executions, arguments.connects)
        slow(run, process)
    if run.gaps or run.doubled or run.reordered:
        run.faults.append("clients did not get every revision once and in order")
    print("\n| | |\n|---|---|")
    for what, measured in run.rows:
        print(f"| {what} | {measured} |")
    for fault, times in Counter(run.faults).items():
        print(f"wrong: {fault}{f' ({times} times)' if times > 1 else ''}")
    print(
        f"watchers: clients={arguments.clients} p50_ms={p50:.0f} p99_ms={p99:.0f} gaps={run.gaps} "
        f"doubled={run.doubled} reordered={run.reordered} subscriptions={run.subscriptions} "
        f"leaked={leaked}"
    )
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
