"""The harness: servers behind proxies, several workers, beat, and flow runners to be killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
from redis.exceptions import RedisError

from producers.client import TagProducer
from producers.contract.channels import inbox_key, lease_key
from producers.contract.messages import Message, register_execution
from producers.inbox.drain_message import QUEUE
from producers.redis_client import open_redis
from tests.faults.check import Sent, Verdict, check_presence
from tests.faults.clocks import Clock, find_library
from tests.faults.producer import Journal, call_file
from tests.support.moments import PostgresMoments, RedisMoments
from tests.support.proxy import Proxy
from tests.support.waiting import eventually
from worker.auth import SCOPES, sign_token
from worker.db.migrate import migrate
from worker.db.tables import ROLES
from worker.local.servers import (
    Postgres,
    Valkey,
    find_server_paths,
    load_or_create_secret,
    lock_directory,
)
from worker.local.stack import DATABASE, free_port, signing_settings
from worker.local.supervisor import ProcessSpec, Supervisor
from worker.settings import Settings

REPOSITORY = Path(__file__).parents[2]
WORKERS = 3
ORGANIZATIONS = 8
BUSY_ORGANIZATIONS = 2
"""Those with two flow runners, and with one that writes over HTTP."""
LEASE_SECONDS = 2
DISK_MEGABYTES = 2048
LAST_LINES = 12


@dataclass
class FaultOrganization:
    """An organization: its flow runners' journals, and the results that were published."""

    id: UUID
    token: str
    executions: list[UUID]
    journals: list[Path]
    registrations: list[Message] = field(default_factory=list)
    published: dict[UUID, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    flushed: set[UUID] = field(default_factory=set)
    """Batches that were in the inbox at a FLUSHALL."""
    watched: dict[UUID, list[int]] = field(default_factory=dict)
    """The revisions that a watcher of the endpoint received, by execution."""
    followed: dict[str, list[Any]] = field(default_factory=dict)
    """The events that readers of the organization's feed received, by their filter for tags."""

    def sent(self) -> list[Sent]:
        registered = {message.batch_id for message in self.registrations}
        found = [Sent("registrations", self.registrations, registered)]
        for path in self.journals:
            journal = Journal(path)
            open_ids = {message.batch_id for message in journal.open.values()}
            known = {message.batch_id for message in journal.known}
            found.append(Sent(path.stem, journal.known, known - open_ids))
        return found


@dataclass
class Harness:
    """Everything that faults are done to."""

    directory: Path
    seed: int
    supervisor: Supervisor
    redis_url: str
    database_url: str
    endpoint_url: str
    failpoint: Path
    proxies: dict[str, Proxy]
    organizations: list[FaultOrganization]
    disk: Path | None
    servers: tuple[Valkey, Postgres]
    large: FaultOrganization
    """One more, whose batches are as large as batches may be. Its content is not compared."""
    clock: Clock | None
    """That of Valkey; None if it can't be stepped here."""
    stop: threading.Event = field(default_factory=threading.Event)
    old_drains: list[bytes] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    """What was done, and when, in seconds since the epoch."""
    signalled: set[int] = field(default_factory=set)
    """Processes that were asked to end."""
    ended: list[str] = field(default_factory=list)
    """What ended though nobody killed it."""

    @property
    def workers_clock(self) -> Path:
        """A file: what the clock of the workers is ahead, in seconds (tests/faults/mutants.py)."""
        return self.directory / "workers.clock"

    def pids(self, prefix: str) -> list[int]:
        return [
            process.pid
            for child, process in self.supervisor.running
            if child.name.startswith(prefix) and process.poll() is None
        ]

    def runners(self) -> list[tuple[str, int]]:
        """The flow runners that live, by the names of their journals."""
        return [
            (child.name.replace("runner", "journal"), process.pid)
            for child, process in self.supervisor.running
            if child.name.startswith("runner") and process.poll() is None
        ]

    def call_of(self, journal: str) -> str:
        """Which call of the SDK this flow runner is inside of, if it is inside one."""
        path = call_file(self.directory / f"{journal}.jsonl")
        return path.read_text().strip() if path.exists() else ""

    def mend(self) -> None:
        """Start again what has ended; here everything is meant to end often."""
        for child, process in self.supervisor.running:
            code = process.poll()
            is_server = child.name in ("postgresql", "valkey")  # these are killed, and are not ours
            expected = is_server or process.pid in self.signalled
            if code not in (None, -signal.SIGKILL) and not expected:
                said = self.supervisor.log(child.name).read_text(errors="replace").splitlines()
                self.ended += [f"{child.name} ended with {code}", *said[-LAST_LINES:]]
                self.signalled.add(process.pid)
        self.supervisor._quick_exits.clear()
        self.supervisor.restart_ended(lambda _: None)

    def redis(self) -> Any:
        return open_redis(self.redis_url)

    def woken(self) -> int:
        """How often beat had to help."""
        return sum(text.count("sent lost drain messages again") for _, text in self.worker_logs())

    def worker_logs(self) -> Iterator[tuple[str, str]]:
        """Yield what each worker has said so far, after its name."""
        for number in range(WORKERS):
            log = self.supervisor.log(f"worker-{number}")
            if log.exists():
                yield log.stem, log.read_text(errors="replace")

    def quiet(self) -> bool:
        """Whether nothing waits and nobody is on the way."""
        try:
            with self.redis() as redis:
                return not any(
                    redis.xlen(inbox_key(each.id)) or redis.exists(lease_key(each.id))
                    for each in [*self.organizations, self.large]
                )
        except RedisError:
            return False

    def unattended(self) -> UUID | None:
        """Return an organization whose messages wait while no drain is queued or running."""
        with self.redis() as redis, redis.pipeline(transaction=True) as multi:
            for each in self.organizations:
                multi.xlen(inbox_key(each.id)).exists(lease_key(each.id))
            found = multi.execute()
        pairs = zip(self.organizations, found[::2], found[1::2], strict=True)
        return next((each.id for each, waiting, lease in pairs if waiting and not lease), None)

    def waiting(self) -> str:
        """Say what waits, and who is on the way."""
        try:
            with self.redis() as redis:
                found = [
                    (
                        redis.xlen(inbox_key(each.id)),
                        redis.get(lease_key(each.id)),
                    )
                    for each in self.organizations
                ]
                queue = redis.llen(QUEUE)
        except RedisError as error:
            return f"Redis can't be asked: {error}"
        inboxes = ", ".join(f"{count} messages under {lease!r}" for count, lease in found)
        return f"{inboxes}; {queue} messages in Celery's queue"

    def listen(self) -> None:
        """Collect every published result, until the harness stops."""
        by_id = {str(each.id): each for each in self.organizations}
        while not self.stop.is_set():
            try:
                with self.redis() as redis, redis.pubsub() as pubsub:
                    pubsub.psubscribe("task-tags:*:results:*")
                    while not self.stop.is_set():
                        message = pubsub.get_message(timeout=0.2)
                        if message and message["type"] == "pmessage":
                            record = json.loads(message["data"])
                            organization = by_id.get(record["organization_id"])
                            if organization:
                                organization.published[UUID(record["batch_id"])].add(
                                    message["data"]
                                )
            except (RedisError, OSError):
                time.sleep(0.1)

    def watch(self, organization: FaultOrganization) -> None:
        """Follow an execution by Server-Sent Events, until the harness stops."""
        execution = organization.executions[0]
        revisions = organization.watched.setdefault(execution, [])
        headers = {"Authorization": f"Bearer {organization.token}"}
        query = {"flow_execution_id": str(execution)}
        while not self.stop.is_set():
            headers["Last-Event-ID"] = str(revisions[-1]) if revisions else "0"
            with suppress(httpx.HTTPError), httpx.Client(timeout=2) as client:
                url = f"{self.endpoint_url}/task-tags/changes/events"
                with client.stream("GET", url, params=query, headers=headers) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: ") and '"revision":' in line:
                            revisions.append(json.loads(line[6:])["revision"])
                        if self.stop.is_set():
                            return
            time.sleep(0.2)

    def follow(self, organization: FaultOrganization, tag: str) -> None:
        """Read the organization's feed by Server-Sent Events, until the harness stops."""
        events = organization.followed.setdefault(tag, [])
        headers = {"Authorization": f"Bearer {organization.token}"}
        query, after, id = {"tag": tag} if tag else {}, "0", "0"
        while not self.stop.is_set():
            with suppress(httpx.HTTPError), httpx.Client(timeout=2) as client:
                url = f"{self.endpoint_url}/changes/events"
                parameters = {**query, "after": after}
                with client.stream("GET", url, params=parameters, headers=headers) as response:
                    for line in response.iter_lines():
                        if line.startswith("id: "):
                            id = line[4:]
                        elif line.startswith("data: "):
                            after = id
                            if '"position":' in line:
                                events.append(json.loads(line[6:]))
                        if self.stop.is_set():
                            return
            time.sleep(0.2)

    def producer(self, organization: FaultOrganization) -> TagProducer:
        return TagProducer(
            redis_url=self.redis_url,
            organization_id=organization.id,
            token=organization.token,
        )

    def database(self) -> psycopg.Connection:
        """Connect as the owner. What is sorted does not go to the small disk of the tables."""
        options = "-c temp_tablespaces=pg_default"
        return psycopg.connect(self.database_url, autocommit=True, options=options)


@contextmanager
def run_harness(directory: Path, seed: int, plant: str) -> Iterator[Harness]:
    """Start it all; flow runners are started by `start_runners`."""
    with lock_directory(directory), Supervisor(directory / "logs") as supervisor:
        home = find_server_paths(directory)
        valkey, postgres = (
            Valkey(home),
            Postgres(home, load_or_create_secret(directory, "postgres")),
        )
        library = find_library()
        clock = None if library is None else Clock(library, directory / "valkey.clock")
        stepped = {} if clock is None else clock.environment
        supervisor.start(replace(valkey.child(), environment=stepped), postgres.child())
        disk = small_disk(directory, supervisor)
        if disk is not None:
            home.own(disk)
            with psycopg.connect(postgres.url(), autocommit=True) as connection:
                connection.execute(f"create tablespace small location '{disk}'".encode())
                connection.execute(f'create database "{DATABASE}" tablespace small'.encode())
        postgres.create_database(DATABASE)
        passwords = {role: load_or_create_secret(directory, role) for role in ROLES}
        owner_url = postgres.url(database=DATABASE)
        migrate(owner_url, passwords)
        with psycopg.connect(owner_url, autocommit=True) as connection:
            # The order of effects, and a tag that the database refuses: for the harness alone.
            connection.execute(
                "alter table tag_batches add column seq bigint generated always as identity"
            )
            connection.execute(
                "alter table task_tags add constraint poison check (tag <> 'poison') not valid"
            )
        proxies = {
            name: Proxy(home.sockets / f"{name}.sock", valkey.socket, RedisMoments)
            for name in ("worker", "runner", "beat", "endpoint")
        }
        for name in ("database", "reads"):
            (home.sockets / name).mkdir(exist_ok=True)
            proxies[name] = Proxy(
                home.sockets / name / ".s.PGSQL.5432",
                home.sockets / ".s.PGSQL.5432",
                PostgresMoments,
            )
        failpoint = directory / "failpoint"
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "TASK_TAGS_JWT_SECRET": load_or_create_secret(directory, "jwt"),
            "TASK_TAGS_LEASE_SECONDS": str(LEASE_SECONDS),
            "FAULTS_FAILPOINT": str(failpoint),
            "FAULTS_CLOCK": str(directory / "workers.clock"),
        }
        settings = signing_settings(directory)
        port = free_port(0)
        harness = Harness(
            directory,
            seed,
            supervisor,
            valkey.url,
            owner_url,
            f"http://127.0.0.1:{port}",
            failpoint,
            proxies,
            [_organization(directory, settings, number) for number in range(ORGANIZATIONS)],
            disk,
            (valkey, postgres),
            _organization(directory, settings, ORGANIZATIONS),
            clock,
        )

        def through(proxy: str, role: str) -> str:
            """Return the URL of the database for a role, through a proxy."""
            return postgres.url(role, passwords[role], DATABASE).replace(
                "host=" + str(home.sockets).replace("/", "%2F"),
                "host=" + str(home.sockets / proxy).replace("/", "%2F"),
            )

        as_worker = {
            **environment,
            "FAULTS_PLANT": plant,
            "TASK_TAGS_REDIS_URL": f"unix://{proxies['worker'].listen}?db=0",
            "TASK_TAGS_DATABASE_URL": through("database", ROLES[0]),
        }
        as_beat = {
            **as_worker,
            "TASK_TAGS_REDIS_URL": f"unix://{proxies['beat'].listen}?db=0",
        }
        as_endpoint = {
            **environment,
            "TASK_TAGS_REDIS_URL": f"unix://{proxies['endpoint'].listen}?db=0",
            "TASK_TAGS_DATABASE_URL": through("reads", ROLES[1]),
        }
        supervisor.start(*_workers(supervisor, as_worker, as_beat, as_endpoint, port))
        threads = [threading.Thread(target=harness.listen)]
        for each in harness.organizations:
            threads.append(threading.Thread(target=harness.watch, args=(each,)))
            for tag in ("", "a"):
                threads.append(threading.Thread(target=harness.follow, args=(each, tag)))
        for thread in threads:
            thread.start()
        try:
            yield harness
        finally:
            harness.stop.set()
            for thread in threads:
                thread.join()
            for proxy in proxies.values():
                proxy.close()


def small_disk(directory: Path, supervisor: Supervisor) -> Path | None:
    """Mount a small file system for the tables, if that is allowed, until the servers end."""
    disk = Path(tempfile.mkdtemp(prefix="faults-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        disk.rmdir()
        return None
    supervisor.afterwards.append(lambda: _unmount(disk))
    disk.chmod(0o700)
    return disk


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", str(disk)], check=True)
    disk.rmdir()


def _organization(directory: Path, settings: Settings, number: int) -> FaultOrganization:
    id = uuid4()
    token = sign_token(
        settings,
        organization_id=id,
        actor=f"runner-{number}",
        scopes=SCOPES,
        lifetime=timedelta(days=1),
    )
    runners = 3 if number < BUSY_ORGANIZATIONS else 1
    journals = [directory / f"journal-{number}-{runner}.jsonl" for runner in range(runners)]
    return FaultOrganization(id, token, [uuid4() for _ in range(3)], journals)


def _workers(
    supervisor: Supervisor,
    as_worker: dict[str, str],
    as_beat: dict[str, str],
    as_endpoint: dict[str, str],
    port: int,
) -> Iterator[ProcessSpec]:
    """Yield workers, beat and the endpoint."""

    def said_ready(name: str) -> bool:
        log = supervisor.log(name)
        return log.exists() and '"message": "ready"' in log.read_text(errors="replace")

    celery = [sys.executable, "-m", "celery", "-A"]
    options = ["--without-gossip", "--without-mingle"]
    commands = {
        f"worker-{number}": [
            *[*celery, "tests.faults.mutants", "worker"],
            *[*options, "-n", f"worker-{number}@%h"],
        ]
        for number in range(WORKERS)
    }
    commands["beat"] = [*celery, "worker", "beat"]
    commands["endpoint"] = [*(sys.executable, "-m", "worker.cli", "endpoint", "--port", str(port))]
    environments = {"beat": as_beat, "endpoint": as_endpoint}
    for name, argv in commands.items():
        yield ProcessSpec(
            name=name,
            argv=argv,
            ready=partial(said_ready, name),
            environment=environments.get(name, as_worker),
        )


def start_runners(harness: Harness, seconds: float) -> None:
    """Register the executions, then start the flow runners that tag them.

    The longer they run the more they pause: what they send has to fit on the disk.
    """
    pause = max(0.1, seconds / 3000)
    runners = []
    with harness.producer(harness.large) as producer:
        for execution in harness.large.executions:
            producer.apply(register_execution(execution))
    for number, organization in enumerate(harness.organizations):
        with harness.producer(organization) as producer:
            for execution in organization.executions:
                organization.registrations.append(register_execution(execution))
                producer.apply(organization.registrations[-1])
        for runner, journal in enumerate(organization.journals):
            over_http = {"FAULTS_OVER_HTTP": "1"} if runner == 2 else {}
            runners.append(
                ProcessSpec(
                    name=f"runner-{number}-{runner}",
                    argv=[
                        *[sys.executable, "-m", "tests.faults.producer", str(journal)],
                        *[f"{harness.seed}-{number}-{runner}", *map(str, organization.executions)],
                    ],
                    ready=lambda: True,
                    environment={
                        "PYTHONPATH": str(REPOSITORY),
                        "TASK_TAGS_REDIS_URL": f"unix://{harness.proxies['runner'].listen}?db=0",
                        "TASK_TAGS_ORGANIZATION_ID": str(organization.id),
                        "TASK_TAGS_TOKEN": organization.token,
                        "TASK_TAGS_LEASE_SECONDS": str(LEASE_SECONDS),
                        "TASK_TAGS_ENDPOINT_URL": harness.endpoint_url,
                        "FAULTS_PAUSE": f"{pause}",
                        **over_http,
                    },
                )
            )
    harness.supervisor.start(*runners)


def stop(harness: Harness, *names: str) -> None:
    """End the processes with these prefixes. Journals keep open what runners did not settle."""
    ending = [each for each in harness.supervisor.running if each[0].name.startswith(names)]
    for each in ending:
        harness.supervisor.running.remove(each)
        each[1].terminate()
    for _, process in ending:
        process.wait(60)


def settle(harness: Harness, verdict: Verdict) -> None:
    """Let everything recover and finish, then send batches without a published result again."""

    def calm() -> bool:
        harness.mend()
        return harness.quiet()

    try:
        eventually(calm, 90)
        for organization in harness.organizations:
            sent = organization.sent()
            with harness.database() as connection:
                rows = connection.execute(
                    "select batch_id from tag_batches where organization_id = %s",
                    [organization.id],
                ).fetchall()
            stored = [row[0] for row in rows]
            check_presence(sent, stored, organization.flushed, verdict)
            missing = set(stored).union(*(each.accepted for each in sent)) - set(
                organization.published
            )
            with harness.producer(organization) as producer:
                producer.enqueue_many(
                    message
                    for each in sent
                    for message in each.messages
                    if message.batch_id in missing
                )
        eventually(calm, 90)
    except AssertionError:
        verdict.add("stuck", f"after 90 s there is still work: {harness.waiting()}")
        with suppress(AssertionError):  # the comparison means something only once nothing moves
            eventually(calm, 300)
