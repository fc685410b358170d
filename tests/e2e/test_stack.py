"""The local stack as a person runs it: starting, stopping, being killed, being started twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from rich.cells import cell_len
from websockets.sync.client import connect

from producers.client import TagProducer
from producers.contract.messages import TagBatch, add, register_execution
from tests.support.servers import Servers
from tests.support.terminal import in_terminal
from tests.support.waiting import eventually
from worker.local.servers import (
    OUTSIDE,
    Postgres,
    find_server_paths,
    load_or_create_secret,
    lock_directory,
    wait_for_orphan,
)
from worker.local.stack import free_port
from worker.local.supervisor import StartupError

REPOSITORY = Path(__file__).parents[2]
LOCKS = [path.name for path in REPOSITORY.glob("requirements*.lock")]


def admin(*words: str, **values: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "worker.cli", *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **values},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def up(directory: Path, *words: str, **values: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `up` until the block ends; yields the process and what it said."""
    process = admin("up", "--data-dir", str(directory), "--port", "0", *words, **values)
    said = ""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said += line
            if "Ctrl-C stops everything" in line:
                break
        assert "Ctrl-C" in said, said
        yield process, said
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def processes_of(directory: Path) -> list[str]:
    """Return command lines of processes with a state directory in environment or arguments."""
    found = []
    needles = {str(directory).encode(), str(find_server_paths(directory).sockets).encode()}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if state != "Z" and entry.name != str(os.getpid()) and any(n in text for n in needles):
            found.append(text[:120].replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_up_says_what_is_ready_and_how_to_use_it_and_ctrl_c_stops_it(space: Path) -> None:
    """A line for each part as it becomes ready, URLs, a token, a command; then nothing runs."""
    with up(space) as (process, said):
        for name in ("postgresql", "valkey", "worker-1", "beat", "endpoint"):
            assert re.search(rf"{name} +ready in \d", said)
        settings = exported(said)
        assert set(settings) == {
            "TASK_TAGS_REDIS_URL",
            "TASK_TAGS_ENDPOINT_URL",
            "TASK_TAGS_ORGANIZATION_ID",
            "TASK_TAGS_TOKEN",
        }
        response = httpx.get(
            f"{settings['TASK_TAGS_ENDPOINT_URL']}/task-tags?flow_execution_id={'0' * 32}",
            headers={"Authorization": f"Bearer {settings['TASK_TAGS_TOKEN']}"},
        )
        assert response.status_code == 404
        second = admin("up", "--data-dir", str(space), "--port", "0")
        output, _ = second.communicate(timeout=30)
        assert second.returncode == 3
        assert (
            f"error: a stack runs already on {space}: pid {process.pid}, "
            f"{settings['TASK_TAGS_ENDPOINT_URL']}; to stop it: kill {process.pid}\n"
        ) in output
        other = admin("up", "--data-dir", str(space / "other"), "--port", "0", **settings)
        output, _ = other.communicate(timeout=30)
        assert other.returncode == 3
        assert "error: TASK_TAGS_REDIS_URL is the server of another local stack" in output
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in output
        assert time.monotonic() - begin < 15
    assert processes_of(space) == []


class AlwaysOk(BaseHTTPRequestHandler):
    """As another stack's endpoint, which is ready."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_a_stack_whose_port_is_taken_as_it_starts_says_so(space: Path) -> None:
    """Two that are started at once: it does not take the other's endpoint for its own."""
    port = free_port(0)
    process = admin("up", "--data-dir", str(space), "--port", str(port))
    assert process.stdout is not None
    assert "starting" in process.stdout.readline()
    assert "ready" in process.stdout.readline()  # a server, before which the port was free
    with ThreadingHTTPServer(("127.0.0.1", port), AlwaysOk) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        output, _ = process.communicate(timeout=60)
        other.shutdown()
    assert process.returncode == 3
    assert re.search(r"error: endpoint ended with 3: \[.*address already in use \(", output), output


def test_what_up_prints_works_as_printed(space: Path) -> None:
    """Each command, in another directory and with nothing of this environment."""
    with up(space, PATH=os.defpath, TASK_TAGS_LOG_LEVEL="ERROR") as (_, said):
        output = run_as_printed(said)
        assert "registered" in output
        assert_the_page_shows_what_changed(said, output)


def test_make_run_in_a_terminal(space: Path) -> None:
    """What it prints works, no time or type is cut, a second one says where it is; then Ctrl-C."""
    clone = space / "ö clone"
    clone.mkdir()
    for name in ("Makefile", "examples", "pyproject.toml", "tools", *LOCKS):
        (clone / name).symlink_to(REPOSITORY / name)
    scripts = clone / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("python", "task-tags", "task-tags-admin"):
        (scripts / name).symlink_to(Path(sys.executable).with_name(name))
    (clone / ".venv" / "pyvenv.cfg").symlink_to(Path(sys.prefix) / "pyvenv.cfg")
    (clone / ".venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    (clone / ".venv" / "run").touch()
    environment = {"PATH": os.defpath, "HOME": str(space), "TERM": "xterm", "LANG": "C.UTF-8"}
    make = ["make", "run", f"PORT={free_port(0)}"]
    with in_terminal(make, clone, environment) as terminal:
        terminal.await_words("Ctrl-C stops everything; the data stays.\n")
        said = terminal.said
        tables = said[said.index("tags of ") : said.index("demo: ")]
        assert len(re.findall(r"review_status +reviewed .* developer  [-\d]{10}T[:\d]{8}Z", tables))
        assert "…" not in tables
        assert max(map(cell_len, re.sub(r"\x1b\[\d*m", "", tables).splitlines())) <= 80
        assert_the_page_shows_what_changed(said, run_as_printed(said))
        second = subprocess.run(
            ["make", "run"], cwd=clone, env=environment, capture_output=True, text=True
        )
        (stop,) = re.findall(rf"{make[-1][5:]}; to stop it: (kill \d+)\n", second.stderr)
        assert "Traceback" not in second.stderr
        terminal.press("\x03")
        terminal.await_end()
        assert terminal.said.removeprefix(said) == "^C  stopping\n"
    with in_terminal(make, clone, environment) as terminal:
        terminal.await_words("Ctrl-C stops everything; the data stays.\n")
        pid = (clone / ".task-tags" / "lock").read_text().partition(" ")[0]
        subprocess.run(re.sub(r"\d+", pid, stop), shell=True, check=True)
        assert terminal.await_end() == 0
        assert terminal.said.endswith("stays.\n  stopping\n")
    assert processes_of(clone) == []


def run_as_printed(said: str) -> str:
    """Run the commands that are printed, in a shell that has nothing of ours; return its output."""
    lines = said.partition("Try in another terminal")[2].splitlines()
    commands = [line for line in lines if line.startswith("  ")]
    assert len(commands) == 8, commands
    done = subprocess.run(
        ["sh", "-eu", "-c", "\n".join(commands)],
        cwd="/",
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def assert_the_page_shows_what_changed(said: str, output: str) -> None:
    """The execution in the link has the tag, also for who has the token that was printed last."""
    found = re.search(r"live page  (http\S+)/#execution=(\S+)&token=", said)
    assert found is not None
    assert f"{found[1]}/docs" in said
    assert httpx.get(f"{found[1]}/docs").status_code == httpx.get(found[1]).status_code == 200
    headers = {"Authorization": f"Bearer {output.split()[-1]}"}
    query = {"flow_execution_id": found[2], "tag": "seen"}
    tags = httpx.get(f"{found[1]}/task-tags", params=query, headers=headers).json()
    assert [(tag["tag_type"], tag["created_by"]) for tag in tags] == [
        ("review_status", "developer")
    ]
    assert "seen" in output


def test_data_survives_and_a_killed_supervisor_leaves_nothing_running(space: Path) -> None:
    """After SIGKILL its children end by themselves, also at work; the next start goes on."""
    execution, count = uuid4(), 2000
    batches = [TagBatch(tags=[add(execution, "t", "t", f"{i}")]) for i in range(count)]
    with up(space) as (process, said):
        settings = exported(said)
        watched = f"{settings['TASK_TAGS_ENDPOINT_URL']}/task-tags/changes".replace("http", "ws")
        headers = {"Authorization": f"Bearer {settings['TASK_TAGS_TOKEN']}"}
        with TagProducer(
            redis_url=settings["TASK_TAGS_REDIS_URL"],
            organization_id=settings["TASK_TAGS_ORGANIZATION_ID"],
            token=settings["TASK_TAGS_TOKEN"],
        ) as producer:
            producer.apply(register_execution(execution))
            watching = connect(
                f"{watched}?flow_execution_id={execution}",
                additional_headers=headers,
                close_timeout=0.1,  # what it has not read keeps it from seeing the end
            )
            producer.enqueue_many(batches)
            assert '"revision":1' in watching.recv(20)  # the worker is at work
            process.kill()
            process.wait()
            eventually(lambda: not processes_of(space), 10)
            watching.close()
    database = Postgres(find_server_paths(space), load_or_create_secret(space, "postgres")).url(
        database="task_tags"
    )
    with up(space), psycopg.connect(database, autocommit=True) as connection:
        stored = "select count(*) from task_tags"
        eventually(lambda: connection.execute(stored).fetchone() == (count,), 30)


def exported(said: str) -> dict[str, str]:
    """Return the settings that `up` prints."""
    return dict(re.findall(r"export (TASK_\w+)='?([^\s']+|[^']+)'?\n", said))


def test_a_part_that_dies_is_started_again(space: Path) -> None:
    """The supervisor says so, and the stack works on."""
    with up(space) as (process, said):
        url = next(iter(re.findall(r"TASK_TAGS_ENDPOINT_URL=(\S+)", said))).strip("'")
        pid = next(
            entry.name
            for entry in Path("/proc").glob("[0-9]*")
            if b"worker.cli\0endpoint" in _command_line(entry)
            and url.rpartition(":")[2].encode() in _command_line(entry)
        )
        os.kill(int(pid), signal.SIGKILL)
        assert process.stdout is not None
        assert "endpoint ended with -9: starting it again" in process.stdout.readline()
        eventually(lambda: _is_ready(url))


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_servers_of_ones_own_are_used_instead(servers: Servers, space: Path) -> None:
    """With both URLs set nothing embedded is started, and the roles get passwords that fit."""
    name = "own_servers"
    with servers.owner() as connection:
        connection.execute(f"create database {name}".encode())
    own = {
        "TASK_TAGS_DATABASE_URL": servers.owner_url.replace("/task_tags?", f"/{name}?"),
        "TASK_TAGS_REDIS_URL": servers.stack.redis_url.replace("db=0", "db=2"),
    }
    with up(space, **own) as (_, said):
        assert "postgresql  ready" not in said
        assert "valkey" not in said.partition("Try in another")[0]
        assert "redis       that of TASK_TAGS_REDIS_URL\n" in said
        assert "postgresql  that of TASK_TAGS_DATABASE_URL\n" in said
        assert "endpoint" in said
    assert not (space / "postgresql").exists()
    _restore_passwords(servers)


def _restore_passwords(servers: Servers) -> None:
    """Restore the passwords of roles, which the test above has changed for the whole server."""
    from worker.db.migrate import migrate

    urls = {
        "task_tags_worker": servers.worker_url,
        "task_tags_endpoint": servers.endpoint_url,
    }
    parsed = {role: re.search(r"://[^:]+:([^@]+)@", url) for role, url in urls.items()}
    migrate(servers.owner_url, {role: match.group(1) for role, match in parsed.items() if match})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_than_root_can_run_it() -> None:
    """With that user's directory; the demonstration succeeds."""
    as_nobody: dict[str, Any] = {
        "user": "nobody",
        "group": "nogroup",
        "extra_groups": [],
        "cwd": "/",
    }
    try:
        subprocess.run([sys.executable, "-c", "import worker.cli"], check=True, **as_nobody)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("this virtual environment can't be reached by another user")
    directory = Path(tempfile.mkdtemp(prefix="task-tags "))
    shutil.chown(directory, "nobody")
    sample = shutil.copytree(REPOSITORY / "examples", directory / "examples")
    try:
        done = subprocess.run(
            [
                *[sys.executable, "-m", "worker.cli", "demo", "--port", "0"],
                *["--data-dir", str(directory / "data"), str(sample / "document-review.jsonl")],
            ],
            env={**os.environ, "HOME": str(directory)},
            capture_output=True,
            text=True,
            timeout=90,
            **as_nobody,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    finally:
        shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="the servers run as another user for root alone")
def test_a_state_directory_never_gets_the_data_of_another_one(tmp_path: Path) -> None:
    """Where the servers can't reach it: their data has its secrets, which are gone."""
    tmp_path.chmod(0o700)
    found = []
    for _ in range(2):
        state = tmp_path / "state"
        state.mkdir()
        found.append(find_server_paths(state).data)
        assert find_server_paths(state).data == found[-1]
        copy = shutil.copytree(state, tmp_path / "copy", symlinks=True)
        found.append(find_server_paths(copy).data)
        shutil.rmtree(copy)
        moved = state.rename(tmp_path / "moved")
        assert find_server_paths(moved).data == found[-2]
        shutil.rmtree(moved)
    for data in found:
        assert state not in data.parents
        shutil.rmtree(data)
    assert len(set(found)) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="the servers run as another user for root alone")
def test_a_state_directory_that_may_be_a_copy_gets_no_data_until_somebody_says(
    tmp_path: Path,
) -> None:
    """After a move to another disk, a restored backup, or a copy whose original was moved."""
    tmp_path.chmod(0o700)
    original, moved, copy = (tmp_path / name for name in ("original", "moved", "copy"))
    original.mkdir()
    data = find_server_paths(original).data
    shutil.copytree(original, copy, symlinks=True)
    original.rename(moved)
    with pytest.raises(StartupError, match="if it is a copy, delete"):
        find_server_paths(copy)
    shutil.copytree(copy, original, symlinks=True)
    with pytest.raises(StartupError, match="if it is that one, restored"):
        find_server_paths(original)
    assert find_server_paths(moved).data == data
    new = find_server_paths(original).data  # now it is known to be a copy
    assert new != data
    shutil.rmtree(moved)
    (data / "state-directory").write_text("")  # as the error says
    assert find_server_paths(copy).data == data
    shutil.rmtree(data)
    shutil.rmtree(new)


@pytest.mark.skipif(os.geteuid() != 0, reason="the servers run as another user for root alone")
@pytest.mark.parametrize("name", ["state", os.fsdecode(b"\xff\xfe")])
def test_a_first_start_that_was_killed_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Wherever that was: the next one makes the data, and keeps them."""
    tmp_path.chmod(0o700)
    state, found = tmp_path / name, set[Path]()
    before = set(OUTSIDE.glob("data-*"))
    for step in ("mkdir", "chmod", "write_bytes", "rename", "symlink_to"):
        state.mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(Path, step, killed)
            with pytest.raises(KeyboardInterrupt):
                find_server_paths(state)
        data = find_server_paths(state).data
        assert find_server_paths(state).data == data
        found.add(data)
        shutil.rmtree(state)
    assert len(found) == 5
    for data in set(OUTSIDE.glob("data-*")) - before:
        shutil.rmtree(data)


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(os.geteuid() != 0, reason="the servers run as another user for root alone")
@pytest.mark.parametrize("path", [b"/elsewhere", b"/" + b"x" * 5000, b"\xff", b"\0"])
def test_a_directory_on_another_disk_is_another_one_whatever_its_inode(
    tmp_path: Path, path: bytes
) -> None:
    """What the data name may be of any kind: only an error says so."""
    tmp_path.chmod(0o700)
    state = tmp_path / "state"
    state.mkdir()
    data = find_server_paths(state).data
    found = state.stat()
    owner = data / "state-directory"
    assert owner.read_text() == f"{state}\n{found.st_dev}:{found.st_ino}\n"
    owner.write_bytes(b"%b\n%d:%d\n" % (path, found.st_dev + 1, found.st_ino))
    with pytest.raises(StartupError, match="of another directory"):
        find_server_paths(state)
    owner.write_text(f"{state}\n{found.st_dev + 1}:{found.st_ino}\n")  # it was mounted again
    assert find_server_paths(state).data == data
    owner.write_text(f"{state}\n{found.st_ino + 1}\n")  # an older form
    with pytest.raises(StartupError, match="of another directory"):
        find_server_paths(state)
    shutil.rmtree(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="the servers run as another user for root alone")
def test_a_state_directory_of_an_older_version_keeps_its_data(tmp_path: Path) -> None:
    """Its name said whose it is, until the directory is restored from a backup."""
    tmp_path.chmod(0o700)
    state, copy = tmp_path / "state", tmp_path / "copy"
    state.mkdir()
    data = OUTSIDE / f"{state.stat().st_ino}-0123456789ab"
    data.mkdir(parents=True)
    (state / "servers").symlink_to(data)
    shutil.copytree(state, copy, symlinks=True)
    with pytest.raises(StartupError):
        find_server_paths(copy)
    assert find_server_paths(state).data == data
    shutil.rmtree(state)
    with pytest.raises(StartupError):
        find_server_paths(copy)
    (data / "state-directory").write_text("")
    assert find_server_paths(copy).data == data
    shutil.rmtree(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="the servers run as another user for root alone")
def test_make_clean_deletes_the_data_of_its_own_state_directory_alone(tmp_path: Path) -> None:
    """Also if the project was renamed; not those of one that it is a copy of."""
    tmp_path.chmod(0o700)
    project, copy, renamed = (tmp_path / name for name in ("a project", "a copy", "renamed"))
    project.mkdir()
    shutil.copy(REPOSITORY / "Makefile", project)
    (project / ".task-tags").mkdir()
    data = find_server_paths(project / ".task-tags").data
    shutil.copytree(project, copy, symlinks=True)
    for directory, is_left in ((copy, True), (project.rename(renamed), False)):
        done = subprocess.run(["make", "clean"], cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0
        assert not (directory / ".task-tags").exists()
        assert data.exists() == is_left
        assert (f"not deleted, for it may be another directory's: {data}" in done.stdout) == is_left


def test_the_demonstration_ends_with_its_summary(space: Path) -> None:
    """`make demo`: exit code 0, the promised last line, each result as expected."""
    process = admin("demo", "--data-dir", str(space), "--port", "0")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    last = output.strip().splitlines()[-1]
    assert last == "demo: 42 batches, 77 operations, 42 results, 32 change events, 39 active tags"
    assert "different:" not in output


def test_the_demonstration_notices_a_difference(space: Path) -> None:
    """Exit code 1 if a status is not the expected one."""
    sample = REPOSITORY / "examples" / "document-review.jsonl"
    shutil.copy(sample, space / "sample.jsonl")
    expected = sample.with_suffix(".expected.jsonl").read_text()
    (space / "sample.expected.jsonl").write_text(expected.replace("not_found", "conflict", 1))
    process = admin("demo", str(space / "sample.jsonl"), "--data-dir", str(space), "--port", "0")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "different: batch" in output


def test_a_stale_pid_file_does_not_stop_a_start(space: Path) -> None:
    """A file that was cut off, or names a process that is something else, is cleared."""
    for content in ("", "garbage", f"{os.getpid()}\n/elsewhere\n", "999999999\n"):
        pid_file = space / "postmaster.pid"
        pid_file.write_text(content)
        wait_for_orphan(pid_file, space, seconds=0.1)
        assert not pid_file.exists()


def test_sockets_outside_the_state_directory_leave_nothing_behind() -> None:
    """They are there if their path would be too long for a socket."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        directory = Path(name) / ("x" * 100)
        with lock_directory(directory):
            directory.chmod(0o755)
            sockets = find_server_paths(directory).sockets
            assert sockets.is_dir()
            assert directory not in sockets.parents
        assert not sockets.exists()
