"""A proxy on unix sockets that can cut, delay and silence connections, and harm single requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.moments import Harm, Moments


class Proxy:
    """Forwards connections from one socket to another, in a separate thread.

    New connections go to what is the target then.
    """

    def __init__(self, listen: Path, target: Path, moments: type[Moments]) -> None:
        self.listen = listen
        self.target = target
        self._moments = moments
        self._harm: Harm | None = None
        self.harmed = 0
        """How many requests were harmed."""
        self.passed: Counter[tuple[Path, str]] = Counter()
        """How many requests were passed on, by target and moment."""
        self.delay = 0.0
        self._open = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # broken connections are what it is for
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait()

    def cut(self) -> None:
        """Close all connections."""
        self._loop.call_soon_threadsafe(self._close_all)

    def slow_down(self, delay: float, seconds: float) -> None:
        """Hold each piece back for a while."""
        self.delay = delay
        time.sleep(seconds)
        self.delay = 0.0

    def silence(self, seconds: float) -> None:
        """Keep connections open and pass nothing on, then close them: half-open connections."""
        self._loop.call_soon_threadsafe(self._open.clear)
        time.sleep(seconds)
        self._loop.call_soon_threadsafe(self._open.set)
        self.cut()

    def harm(self, harm: Harm, seconds: float) -> bool:
        """Harm all requests of a moment for a while; return whether there was one.

        For those of a new connection, the others are cut.
        """
        before = self.harmed
        with self.harming(harm):
            if harm.moment == "connect":
                self.cut()
            time.sleep(seconds)
        return self.harmed > before

    @contextlib.contextmanager
    def harming(self, harm: Harm) -> Iterator[None]:
        """Harm all requests of a moment until the block ends."""
        self._harm = harm
        try:
            yield
        finally:
            self._harm = None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()

    def _end(self) -> None:
        self._server.close()
        self._close_all()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        ended = asyncio.gather(*tasks, return_exceptions=True)
        ended.add_done_callback(lambda _: self._loop.stop())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._open.set()
        self.listen.unlink(missing_ok=True)
        starting = asyncio.start_unix_server(self._serve, str(self.listen))
        self._server = self._loop.run_until_complete(starting)
        self.listen.chmod(0o777)
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _close_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target, halve = self.target, asyncio.Event()
        self._writers.add(writer)
        upstream = None
        try:
            upstream = await asyncio.open_unix_connection(str(target))
            self._writers.add(upstream[1])
            await asyncio.gather(
                self._pump_requests(reader, writer, upstream[1], target, halve),
                self._pump(upstream[0], writer, halve),
            )
        except OSError:
            pass  # there is no server
        finally:
            for each in (writer, upstream[1]) if upstream else (writer,):
                self._writers.discard(each)
                each.close()

    async def _pump_requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: asyncio.StreamWriter,
        target: Path,
        halve: asyncio.Event,
    ) -> None:
        moments = self._moments()
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._open.wait()
                for moment, request in moments.split(data):
                    harm = self._harm
                    if harm is None or harm.moment != moment:
                        self.passed[target, moment] += 1
                        upstream.write(request)
                        continue
                    self.harmed += 1
                    if harm.fault == "error":
                        answer, instead = moments.error(harm.code, request)
                        writer.write(answer)
                        upstream.write(instead)
                    elif harm.fault == "end":
                        writer.write(moments.error(harm.code, b"\0")[0])
                        writer.close()
                    elif harm.fault in ("hang", "lose"):
                        await asyncio.sleep(harm.seconds if harm.fault == "hang" else 0)
                        writer.transport.abort()
                        upstream.close()
                        return  # nothing comes through behind what was lost
                    elif harm.fault == "half an answer":
                        halve.set()
                        upstream.write(request)
                    else:  # the server does it, and its answer is lost
                        upstream.write(request)
                        await upstream.drain()
                        await asyncio.sleep(0.05)
                        writer.transport.abort()
                await upstream.drain()
        with contextlib.suppress(OSError):
            upstream.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, halve: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._open.wait()
                writer.write(data[: len(data) // 2] if halve.is_set() else data)
                await writer.drain()
                if halve.is_set():
                    break
        with contextlib.suppress(OSError):
            writer.close()
