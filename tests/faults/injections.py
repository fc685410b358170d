"""The faults: functions that damage the harness's servers, for the product to recover from."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from uuid import UUID, uuid4

import psycopg
from redis.exceptions import RedisError

from producers.contract.channels import failing_key, inbox_key, lease_key
from producers.contract.messages import TagBatch, add, remove, split_batches
from producers.errors import TaskTagsError
from producers.inbox.drain_message import QUEUE, task_message
from tests.faults.clocks import CACHE_SECONDS
from tests.faults.harness import LEASE_SECONDS, Harness
from tests.faults.mutants import FAILPOINTS
from tests.faults.producer import CALLS, Journal
from tests.support.malformed import celery_messages, stream_entries
from tests.support.moments import FAULTS, POSTGRES_MOMENTS, REDIS_CODES, SQL_STATES, Harm
from tests.support.waiting import eventually
from worker.db.tables import ROLES

ENDPOINT_MOMENTS = ("record", "changes", "feed", "heads", "recovery")

Injection = Callable[[Harness, random.Random], None]


def _signal(prefix: str, number: signal.Signals) -> Injection:
    def inject(harness: Harness, choose: random.Random) -> None:
        pids = harness.pids(prefix)
        if pids:
            pid = choose.choice(pids)
            harness.signalled.add(pid)
            os.kill(pid, number)

    return inject


def _kill_runner_in(call: str) -> Injection:
    """Kill a flow runner that is inside this call of the SDK."""

    def inject(harness: Harness, choose: random.Random) -> None:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            for name, pid in harness.runners():
                if harness.call_of(name) == call:
                    os.kill(pid, signal.SIGKILL)
                    return
        raise OSError(f"no flow runner was inside {call}")

    return inject


def stop_worker(harness: Harness, choose: random.Random) -> None:
    """Standing still for longer than the lease, then going on as if nothing had been."""
    pid = choose.choice(harness.pids("worker"))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(LEASE_SECONDS * 1.5)
    os.kill(pid, signal.SIGCONT)


def _failpoint(name: str) -> Injection:
    def inject(harness: Harness, choose: random.Random) -> None:
        draft = harness.failpoint.with_suffix(".new")
        draft.write_text(name)
        draft.rename(harness.failpoint)
        deadline = time.monotonic() + 3
        while harness.failpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        harness.failpoint.unlink(missing_ok=True)

    return inject


def _cut(proxy: str) -> Injection:
    return lambda harness, choose: harness.proxies[proxy].cut()


def _delay(proxy: str) -> Injection:
    return lambda harness, choose: harness.proxies[proxy].slow_down(
        0.05 + choose.random() * 0.3, 1.0
    )


def _half_open(proxy: str) -> Injection:
    return lambda harness, choose: harness.proxies[proxy].silence(1.0 + choose.random() * 2)


def lose_drain(harness: Harness, choose: random.Random) -> None:
    """Take drain messages off the Celery queue; keep one, to be delivered much later."""
    with harness.redis() as redis:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            if message := redis.rpop(QUEUE):
                harness.old_drains.append(message)
                return


def deliver_drain_again(harness: Harness, choose: random.Random) -> None:
    """Drain messages of any age, once more, several at once."""
    with harness.redis() as redis:
        for message in choose.sample(harness.old_drains, min(3, len(harness.old_drains))):
            redis.lpush(QUEUE, message)
        for message in redis.lrange(QUEUE, 0, 3):
            redis.lpush(QUEUE, message)


def two_drains(harness: Harness, choose: random.Random) -> None:
    """Delete the leases of drains at work, again and again: other drains begin beside them."""
    with harness.redis() as redis:
        for _ in range(20):
            for organization in harness.organizations:
                redis.delete(lease_key(organization.id))
            time.sleep(0.02)


def same_batch_at_once(harness: Harness, choose: random.Random) -> None:
    """Copies of batches that were just sent, from several threads."""
    organization = choose.choice(harness.organizations)
    known = Journal(choose.choice(organization.journals)).known[-20:]
    if not known:
        return

    def send() -> None:
        with suppress(TaskTagsError), harness.producer(organization) as producer:
            producer.enqueue_many(known)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kill_subscribers(harness: Harness, choose: random.Random) -> None:
    """Every pub/sub connection, the workers' remote control included."""
    with harness.redis() as redis:
        redis.client_kill_filter(_type="pubsub")


def slow_subscriber(harness: Harness, choose: random.Random) -> None:
    """One that does not read, until the server drops it."""
    with harness.redis() as redis, socket.socket(socket.AF_UNIX) as slow:
        redis.config_set("client-output-buffer-limit", "pubsub 64kb 32kb 1")
        slow.connect(str(harness.proxies["worker"].target))
        slow.sendall(b"PSUBSCRIBE *\r\n")
        time.sleep(1.0)
        redis.config_set("client-output-buffer-limit", "pubsub 32mb 8mb 60")


def poison(harness: Harness, choose: random.Random) -> None:
    """Every stream entry that nobody can decode, between good ones."""
    entries = list(stream_entries().values())
    with harness.redis() as redis:
        for entry in choose.sample(entries, len(entries)):
            redis.xadd(inbox_key(choose.choice(harness.organizations).id), entry)
            time.sleep(0.005)


def garbage_on_the_queue(harness: Harness, choose: random.Random) -> None:
    """Every malformed Celery message, between drain messages."""
    messages = list(celery_messages().values())
    with harness.redis() as redis:
        for message in choose.sample(messages, len(messages)):
            redis.lpush(QUEUE, message)
            time.sleep(0.005)


def flush_everything(harness: Harness, choose: random.Random) -> None:
    """FLUSHALL. What was in an inbox is gone, and the harness remembers what that was."""
    with harness.redis() as redis, redis.pipeline(transaction=True) as multi:
        for organization in harness.organizations:
            multi.xrange(inbox_key(organization.id))
        multi.flushall()
        *inboxes, _ = multi.execute()
    for organization, entries in zip(harness.organizations, inboxes, strict=True):
        for _, fields in entries:
            with suppress(Exception):  # it may be malformed in any way
                organization.flushed.add(UUID(json.loads(fields[b"message"])["batch_id"]))


def fill_the_disk(harness: Harness, choose: random.Random) -> None:
    """Fill the disk of PostgreSQL's tables, for a while."""
    if harness.disk is None:
        raise OSError("there is no disk to fill")
    filler = harness.disk / "filler"
    try:
        with filler.open("wb") as file, suppress(OSError):
            while True:
                file.write(bytes(1024 * 1024))
    except OSError:
        pass  # what was still buffered did not fit either
    time.sleep(1.0 + choose.random())
    filler.unlink()


def demote_valkey(harness: Harness, choose: random.Random) -> None:
    """Make it a replica of a server that is away, for a while, with all connections open."""
    with harness.redis() as redis:
        redis.replicaof("127.0.0.1", 1)
        try:
            time.sleep(0.5 + choose.random() * 2)
        finally:
            redis.replicaof("NO", "ONE")


def demote_postgresql(harness: Harness, choose: random.Random) -> None:
    """Start it again as a standby, and promote it after a while."""
    _, postgres = harness.servers
    signal_file = postgres.home.data / "postgresql" / "standby.signal"
    signal_file.touch()
    postgres.home.own(signal_file)
    for pid in harness.pids("postgresql"):
        os.kill(pid, signal.SIGINT)
    eventually(lambda: not harness.pids("postgresql"), 10)
    harness.mend()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(psycopg.Error), harness.database() as connection:
            time.sleep(0.5 + choose.random() * 2)
            connection.execute("select pg_promote()")
            return
        harness.mend()
        time.sleep(0.1)


SESSION_SETTINGS = (
    *("client_encoding = 'LATIN1'", "timezone = 'Europe/Berlin'", "datestyle = 'SQL, DMY'"),
    *("intervalstyle = 'sql_standard'", "bytea_output = 'escape'", "extra_float_digits = -15"),
    *("default_transaction_isolation = 'serializable'", "default_transaction_read_only = on"),
    *("search_path = 'pg_catalog'", "row_security = off", "statement_timeout = 1"),
    *("lock_timeout = 1", "enable_indexscan = off", "standard_conforming_strings = off"),
    *(
        "idle_in_transaction_session_timeout = 1",
        "jit = on",
        "plan_cache_mode = force_generic_plan",
    ),
)


def session_setting(harness: Harness, choose: random.Random) -> None:
    """Give the roles of worker and endpoint a hostile setting, for new connections, for a while."""
    setting = choose.choice(SESSION_SETTINGS)
    with harness.database() as connection:
        for change in (f"set {setting}", "reset all"):
            for role in ROLES:
                connection.execute(f"alter role {role} {change}".encode())
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = any(%s)",
                [list(ROLES)],
            )
            time.sleep(0.5 + choose.random() * 1.5)


def wrong_type(harness: Harness, choose: random.Random) -> None:
    """Make keys of the protocol something else; an inbox alone if nothing is in it."""
    with harness.redis() as redis:
        for organization in harness.organizations:
            key = choose.choice([lease_key, failing_key])(organization.id)
            redis.eval(_MAKE_STRING, 1, key)
            redis.eval(_MAKE_LIST, 1, inbox_key(organization.id))
        redis.eval(_MAKE_STRING, 1, choose.choice(["task-tags:waiting", "task-tags:wake"]))


_MAKE_STRING = "redis.call('del', KEYS[1]) redis.call('rpush', KEYS[1], 'junk')"
_MAKE_LIST = """
    if redis.call('type', KEYS[1]).ok ~= 'stream' or redis.call('xlen', KEYS[1]) > 0 then
        return 0
    end
    redis.call('del', KEYS[1])
    return redis.call('rpush', KEYS[1], 'junk')
"""


def large_batches(harness: Harness, choose: random.Random) -> None:
    """Send batches that change as much as a batch may, more than it may, and copies of them."""
    organization = harness.large
    execution = choose.choice(organization.executions)
    text = "x" * 8_000
    added = [add(execution, "task", f"{n % 3}", "x", f"{text}{n}") for n in range(600)]
    batches = split_batches(added)
    too_large = TagBatch(tags=[remove(execution, "task", f"{n}", "x") for n in range(3)])
    removed = [TagBatch(tags=[remove(execution, "task", f"{n}", "x")]) for n in range(3)]
    with suppress(TaskTagsError), harness.producer(organization) as producer:
        producer.enqueue_many([*batches, too_large, *removed, *batches[:1] * 50, *removed])


def purge(harness: Harness, choose: random.Random) -> None:
    """Send the Celery tasks that beat sends once in an hour and every 5 s, several at once."""
    with harness.redis() as redis:
        for task in ("task_tags.purge", "task_tags.wake", "task_tags.purge"):
            redis.lpush(QUEUE, task_message(task, str(uuid4()), []))
    time.sleep(choose.random())


BEAT_SECONDS = 5.0
"""Beat sends something once in this time."""


def _harm(proxy: str, moment: str, fault: str, codes: tuple[str, ...]) -> Injection:
    """Harm the requests of a moment for a while, with any code of its class."""

    def inject(harness: Harness, choose: random.Random) -> None:
        harm, seconds = Harm(moment, fault, choose.choice(codes)), 0.3 + choose.random() * 2
        if proxy == "beat":
            seconds += BEAT_SECONDS
        if moment == "purge":  # it comes while requests are harmed
            seconds += 1
            own = random.Random(choose.random())
            threading.Timer(0.2, purge, (harness, own)).start()
        if not harness.proxies[proxy].harm(harm, seconds):
            raise OSError("there was no such request")

    return inject


def step_clock(harness: Harness, choose: random.Random) -> None:
    """Step the clock of Valkey forwards or back, and back again after some seconds."""
    if harness.clock is None:
        raise OSError("clocks can't be stepped here")
    harness.clock.step(choose.choice((-1, 1)) * choose.choice((2, 30, 600, 3600)))
    time.sleep(2 * CACHE_SECONDS + choose.random() * 4)
    harness.clock.step(0)


def _harms() -> Iterator[tuple[str, Injection]]:
    """Yield faults by party, fault and moment."""
    moments = {
        "worker": ("connect", "take", "acquire", "publish", "hand over"),
        "runner": ("connect", "append"),
        "beat": ("connect", "send"),
        "endpoint": ("connect", "append", "subscribe"),
    }
    for proxy, some in moments.items():
        for moment in some:
            for fault in FAULTS:
                yield f"{proxy}: {fault} at {moment}", _harm(proxy, moment, fault, REDIS_CODES)
    for moment in POSTGRES_MOMENTS:
        for fault in FAULTS:
            yield f"worker: {fault} at {moment}", _harm("database", moment, fault, SQL_STATES)
    for fault in FAULTS:
        yield f"purge: {fault} at purge", _harm("database", "purge", fault, SQL_STATES)
    for moment in ENDPOINT_MOMENTS:
        for fault in FAULTS:
            yield f"endpoint: {fault} at {moment}", _harm("reads", moment, fault, SQL_STATES)


def step_workers_clock(harness: Harness, choose: random.Random) -> None:
    """Step the clock of the workers forwards or back, and back again after some seconds."""
    harness.workers_clock.write_text(str(choose.choice((-1, 1)) * choose.choice((2, 30, 600))))
    time.sleep(1.0 + choose.random() * 4)
    harness.workers_clock.write_text("0")


INJECTIONS: dict[str, Injection] = {
    **dict(_harms()),
    "kill worker": _signal("worker", signal.SIGKILL),
    "end worker": _signal("worker", signal.SIGTERM),
    "stop worker": stop_worker,
    "kill beat": _signal("beat", signal.SIGKILL),
    "kill endpoint": _signal("endpoint", signal.SIGKILL),
    "end endpoint": _signal("endpoint", signal.SIGTERM),
    "kill valkey": _signal("valkey", signal.SIGKILL),
    "kill postgresql": _signal("postgresql", signal.SIGKILL),
    **{f"die {name.replace('_', ' ')}": _failpoint(name) for name in FAILPOINTS},
    "cut worker-redis": _cut("worker"),
    "cut runner-redis": _cut("runner"),
    "cut worker-database": _cut("database"),
    "delay worker-redis": _delay("worker"),
    "delay runner-redis": _delay("runner"),
    "delay worker-database": _delay("database"),
    "silence worker-redis": _half_open("worker"),
    "silence runner-redis": _half_open("runner"),
    "silence worker-database": _half_open("database"),
    "cut endpoint-redis": _cut("endpoint"),
    "cut endpoint-database": _cut("reads"),
    "silence endpoint-redis": _half_open("endpoint"),
    "silence endpoint-database": _half_open("reads"),
    "step the clock of valkey": step_clock,
    "step the clock of workers": step_workers_clock,
    "demote valkey": demote_valkey,
    "demote postgresql": demote_postgresql,
    "session setting": session_setting,
    "wrong type": wrong_type,
    "large batches": large_batches,
    "purge": purge,
    "lose drain": lose_drain,
    "deliver drain again": deliver_drain_again,
    "two drains": two_drains,
    "same batch at once": same_batch_at_once,
    **{f"kill runner in {call}": _kill_runner_in(call) for call in CALLS},
    "kill subscribers": kill_subscribers,
    "slow subscriber": slow_subscriber,
    "poison": poison,
    "garbage on the queue": garbage_on_the_queue,
    "flush everything": flush_everything,
    "fill the disk": fill_the_disk,
}


def inject(name: str, harness: Harness, choose: random.Random) -> bool:
    """Do one fault; False if it could not be done now, because what it is done to is away."""
    try:
        INJECTIONS[name](harness, choose)
    except (RedisError, OSError, IndexError, psycopg.Error):
        return False
    return True
