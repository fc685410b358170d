"""One session of the write side: the workers of one contender, its loads and their cost."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final
from uuid import UUID

from tests.bench.contenders import Contender, Item, Sender, Setting
from tests.bench.load import Batches, Load, organization, register
from tests.bench.processes import Workers, cpu_seconds, server_pids
from tests.bench.results import Missing, Results
from tests.bench.servers import RUN, BenchServers

RESULT_SECONDS: Final = 60.0
"""How long results are waited for, and a second more for each 50 of them."""
START_SECONDS: Final = 30.0
LATENCY: Final = Load(1, 8, 0)
"""What latency and enqueue are measured with."""
_TABLES: Final = ("flow_executions", "task_tags", "tag_batches", "tag_changes")
_FORGET_STATISTICS: Final = """
    select pg_clear_attribute_stats(schemaname, tablename, attname, inherited)
      from pg_stats where tablename = any(%s)
"""


class Session:
    """The running workers of a contender, and its sender. Use it as a context manager."""

    def __init__(
        self,
        opened: BenchServers,
        batches: Batches,
        contender: Contender,
        setting: Setting,
        warm_up: int,
    ) -> None:
        self.servers = opened
        self.batches = batches
        self.contender = contender
        self.setting = setting
        self.warm_up = warm_up
        self.workers: Workers
        self.sender: Sender | None = None
        self._variables = {f"BENCH_{name.upper()}": str(value) for name, value in setting.items()}

    def __enter__(self) -> Session:
        os.environ.update(self._variables)  # the sender reads them too
        self.contender.prepare()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        for name in self._variables:
            os.environ.pop(name, None)

    def _start(self) -> None:
        """Start the workers on an empty queue, and wait until one of them answers."""
        commands = self.contender.commands(self.setting)
        self.workers = Workers(self.servers.supervisor, commands, self.contender.environment)
        self.sender = self.contender.sender()
        _probe(self)

    def _stop(self) -> None:
        self.workers.stop()
        if self.sender is not None:
            self.sender.close()
            self.sender = None

    def throughput(self, load: Load) -> dict[str, float]:
        """Run a load; return its figures. Raises `Missing` unless every batch was answered."""
        warm = self.batches.take(replace(load, batches=max(self.warm_up, load.organizations)), "w")
        items = self.batches.take(load)
        rows, fsyncs = self._reset(load), self._fsyncs()
        with Results(self.servers.redis_url, _organizations(load)) as results:
            self._send(warm, results)
            self.workers.forget_peak()
            before = self._costs()
            begin, end = self._send(items, results)
            after = self._costs()
        applied = len(warm) + len(items)
        self._check(rows, applied, applied * load.operations)
        peak = self.workers.peak_memory_mb()
        count, seconds = len(items), end - begin
        workers, all_, wal = (late - early for early, late in zip(before, after, strict=True))
        return {
            "batches_per_second": count / seconds,
            "operations_per_second": count * load.operations / seconds,
            "cpu_seconds_per_1000": all_ / count * 1000,
            "worker_cpu_seconds_per_1000": workers / count * 1000,
            "peak_memory_mb": peak,
            "wal_bytes_per_batch": wal / count,
            "fsyncs_per_batch": (self._fsyncs_of_all() - fsyncs) / applied,
        }

    def latency(self, rate: float, count: int) -> dict[str, float]:
        """Enqueue single batches at a rate; return percentiles of the milliseconds to a result.

        And the processor time that a batch takes, of the workers, PostgreSQL and Valkey.
        """
        load = replace(LATENCY, batches=count)
        warm = self.batches.take(replace(load, batches=self.warm_up), "w")
        items = self.batches.take(load)
        self._reset(load)
        with Results(self.servers.redis_url, _organizations(load), timed=True) as results:
            self._send(warm, results)
            results.expect(count)
            _, before, _ = self._costs()
            seconds = self._paced(items, rate, results)
            _, after, _ = self._costs()
        cuts = statistics.quantiles(seconds, n=100)
        return {
            **{f"p{p}_ms": cuts[p - 1] * 1000 for p in (50, 95, 99)},
            "cpu_ms_per_batch": (after - before) / count * 1000,
        }

    def _paced(self, items: Sequence[Item], rate: float, results: Results) -> list[float]:
        assert self.sender is not None
        sender = self.sender
        begun, answered, start = {}, {}, time.perf_counter()
        for number, item in enumerate(items):
            time.sleep(max(0, start + number / rate - time.perf_counter()))
            begun[item.batch.batch_id] = time.perf_counter()
            sender.send_one(item)
            if self.contender.answers:
                answered[item.batch.batch_id] = time.perf_counter()
        results.wait(RESULT_SECONDS)
        ended = answered or results.times
        return [ended[batch_id] - at for batch_id, at in begun.items()]

    def _send(self, items: Sequence[Item], results: Results) -> tuple[float, float]:
        assert self.sender is not None
        results.expect(len(items))
        begin = time.perf_counter()
        self.sender.send(items)
        try:
            return begin, results.wait(RESULT_SECONDS + len(items) / 50)
        except Missing as missing:
            raise Missing(f"{missing}; its log: {self.workers.last_words()}") from None

    def _reset(self, load: Load) -> tuple[int, int]:
        """Empty the tables, unless they are to be full; return the numbers of batches and tags.

        Their statistics are forgotten, too: with those of a load of 200 organizations, look-ups of
        the next load, of one, could take an index that reads all of its rows.
        """
        with self.servers.owner() as connection:
            if not load.prefilled:
                connection.execute(f"truncate {', '.join(_TABLES)}".encode())
                connection.execute(_FORGET_STATISTICS, [list(_TABLES)])
                register(connection, load.organizations)
            connection.execute("checkpoint")
        return self._rows()

    def _rows(self) -> tuple[int, int]:
        with self.servers.owner() as connection:
            found = connection.execute(
                "select (select count(*) from tag_batches), (select count(*) from task_tags)"
            ).fetchone()
        assert found is not None
        return found[0], found[1]

    def _check(self, before: tuple[int, int], batches: int, tags: int) -> None:
        after = self._rows()
        applied = after[0] - before[0], after[1] - before[1]
        if applied != (batches, tags):
            raise Missing(f"{batches} batches of {tags} tags were sent, {applied} are stored")

    def _costs(self) -> tuple[float, float, float]:
        """Return the processor time of the workers and of all, and where the WAL ends."""
        workers = self.workers.cpu_seconds()
        all_ = workers + cpu_seconds(server_pids(self.servers.supervisor))
        return workers, all_, self._number("select pg_current_wal_insert_lsn() - '0/0'")

    def _fsyncs(self) -> float:
        return self._number("select coalesce(sum(fsyncs), 0) from pg_stat_io where object = 'wal'")

    def _fsyncs_of_all(self) -> float:
        """Return how often the WAL was synced, by ended connections as well.

        A connection reports that when it ends, at the latest. So all are ended; workers reconnect.
        """
        if self.contender.queue_in_database:
            self._stop()
            count = self._fsyncs()
            self._start()
            return count
        self._disconnect()
        return self._fsyncs()

    def _number(self, query: str) -> float:
        with self.servers.owner("postgres") as connection:
            found = connection.execute(query.encode()).fetchone()
        assert found is not None
        return float(found[0])

    def _disconnect(self) -> None:
        """End all connections to the run's database, so that each has reported what it did."""
        others = "from pg_stat_activity where datname = %s and pid <> pg_backend_pid()"
        with self.servers.owner("postgres") as connection:
            connection.execute(f"select pg_terminate_backend(pid) {others}".encode(), [RUN])
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                if connection.execute(f"select {others}".encode(), [RUN]).fetchone() is None:
                    return
                time.sleep(0.01)


def _probe(begun: Session) -> None:
    """Send one batch and wait for its result; then wait until all workers have started."""
    load = Load(1, 1, 1)
    with begun.servers.owner() as connection:
        register(connection)
    with Results(begun.servers.redis_url, _organizations(load)) as results:
        results.expect(1)
        deadline = time.monotonic() + START_SECONDS
        _send_when_it_listens(begun, begun.batches.take(load, "p")[0], deadline)
        while True:
            begun.workers.check()
            try:
                results.wait(0.2)
                break
            except Missing:
                if time.monotonic() > deadline:
                    words = begun.workers.last_words()
                    raise Missing(f"its workers do not answer: {words}") from None
    begun.workers.settle()


def _send_when_it_listens(begun: Session, item: Item, deadline: float) -> None:
    """Send the probe; who sends to workers directly has to listen first."""
    while True:
        assert begun.sender is not None
        try:
            begun.sender.send_one(item)
        except OSError:
            begun.workers.check()
            if not begun.contender.answers or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _organizations(load: Load) -> list[UUID]:
    return [organization(number) for number in range(load.organizations)]


def enqueue(opened: BenchServers, batches: Batches, contender: Contender, count: int) -> float:
    """Return how many batches a second one producer enqueues while no worker runs."""
    opened.fresh()
    contender.prepare()
    load = replace(LATENCY, batches=count)
    warm, items = batches.take(replace(load, batches=16), "w"), batches.take(load)
    sender = contender.sender()
    try:
        sender.send(warm)
        begin = time.perf_counter()
        sender.send(items)
        return len(items) / (time.perf_counter() - begin)
    finally:
        sender.close()
