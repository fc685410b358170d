"""The commands with unusual standard streams, input and environment: one line says what is wrong.

Real shells close and redirect the streams, as a person or a supervisor does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis import Redis

from producers.client import TagProducer
from producers.contract.messages import TagBatch, add, register_execution
from producers.inbox.protocol import Inbox
from tests.support.commands import environment, run
from tests.support.servers import Servers
from tests.support.waiting import eventually

MAIN = "from {module} import main; main()"


@pytest.fixture
def mine(servers: Servers, organization: UUID, token: str) -> dict[str, str]:
    """Settings of the test's own organization."""
    return {"TASK_TAGS_ORGANIZATION_ID": str(organization), "TASK_TAGS_TOKEN": token}


@pytest.fixture
def unread(servers: Servers, mine: dict[str, str], quiet_redis: Redis) -> dict[str, str]:
    """The same, with a Redis database that no worker reads."""
    return mine | {"TASK_TAGS_REDIS_URL": servers.stack.redis_url.replace("db=0", "db=1")}


def shell(
    servers: Servers,
    redirection: str,
    *arguments: str,
    module: str = "producers.cli",
    stdin: Any = b"",
    **values: str,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command behind a redirection; `| true` is a reader that is gone."""
    command = f'"$0" "$@" {redirection}'
    if redirection.startswith("|"):
        command += "; exit ${PIPESTATUS[0]}"
    return subprocess.run(
        ["bash", "-c", command, sys.executable, "-c", MAIN.format(module=module), *arguments],
        input=stdin,
        capture_output=True,
        timeout=60,
        env=environment(servers, **values),
    )


def batches(count: int, *, ids: bool = True) -> bytes:
    """Return lines that register executions."""
    lines = []
    for _ in range(count):
        fields = json.loads(register_execution(uuid4()).encode())
        lines.append(json.dumps({k: v for k, v in fields.items() if ids or k != "batch_id"}))
    return "".join(f"{line}\n" for line in lines).encode()


# --- Output that can't be written ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirection", "words", "module"),
    [
        (">/dev/full", "--help", "producers.cli"),
        ("| { exec <&-; sleep 0.2; }", "--help", "producers.cli"),
        (">/dev/full", "schema --asyncapi", "producers.cli"),
        (">&-", "enqueue -", "producers.cli"),
        (">/dev/full", "enqueue -", "producers.cli"),
        ("| { exec <&-; sleep 0.2; }", "enqueue -", "producers.cli"),
        (">/dev/full", "enqueue - --wait --json", "producers.cli"),
        (">&-", "list {id}", "producers.cli"),
        ("| { exec <&-; sleep 0.2; }", "openapi", "worker.cli"),
        (">&-", "token --org {id}", "worker.cli"),
        (">/dev/full", "rejected --help", "worker.cli"),
    ],
)
def test_output_that_cannot_be_written_is_exit_code_6(
    servers: Servers,
    mine: dict[str, str],
    producer: TagProducer,
    redirection: str,
    words: str,
    module: str,
) -> None:
    """And one line, which also says what was enqueued."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    secret = servers.settings.jwt_secret
    assert secret is not None
    values = mine | {"TASK_TAGS_JWT_SECRET": secret.get_secret_value()}
    arguments = words.format(id=execution).split()
    done = shell(servers, redirection, *arguments, module=module, stdin=batches(3), **values)
    errors = done.stderr.decode().splitlines()
    assert (done.returncode, len(errors)) == (6, 1), done
    assert errors[0].startswith("error: standard output can't be written: ")
    assert ("3 of 3 batches were enqueued, up to line 3" in errors[0]) == ("enqueue" in words)


def test_ids_that_cannot_be_printed_are_not_used(
    servers: Servers, unread: dict[str, str], quiet_redis: Redis, organization: UUID
) -> None:
    """New ids are printed before their batches are sent: none is enqueued that nobody knows."""
    sent = batches(2, ids=False)
    done = shell(servers, ">/dev/full", "enqueue", "-", stdin=sent, **unread)
    assert done.returncode == 6
    assert b"0 of 2 batches were enqueued" in done.stderr
    assert quiet_redis.xlen(Inbox(quiet_redis, organization)._inbox) == 0


@pytest.mark.parametrize("redirection", ["2>/dev/full", "<&- 2>&- >&-"])
def test_the_exit_code_needs_no_standard_error(
    servers: Servers, mine: dict[str, str], redirection: str
) -> None:
    """Wrong input is 2, also where standard error is closed or full."""
    for arguments in (["nonsense"], ["enqueue", "/nowhere"], ["enqueue", "-", "--timeout", "x"]):
        done = shell(servers, redirection, *arguments, **mine)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_a_reader_that_has_enough_ends_a_watch(
    servers: Servers, mine: dict[str, str], producer: TagProducer
) -> None:
    """As `watch | head -1`: exit code 6 at the first change that nobody reads."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    producer.batch().add(execution, "t", "t", "a").apply()
    words = ["watch", str(execution), "--after", "0", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN.format(module="producers.cli"), *words],
        env=environment(servers, **mine),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["revision"] == 1
        process.stdout.close()
        producer.batch().add(execution, "t", "t", "b").apply()
        said = b"error: standard output can't be written: Broken pipe\n"
        assert (process.wait(60), process.stderr.read()) == (6, said)


# --- Input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirection", "said"),
    [("<&-", b"standard input is closed"), ("</dev/null 0>/dev/null", b"standard input: Bad file")],
)
def test_input_that_cannot_be_read_is_exit_code_2(
    servers: Servers, mine: dict[str, str], redirection: str, said: bytes
) -> None:
    for more in ([], ["--unchecked"], ["--wait"]):
        done = shell(servers, redirection, "enqueue", "-", *more, **mine)
        assert (done.returncode, done.stdout) == (2, b"")
        assert said in done.stderr
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("count", [5815, 20_000], ids=["with the last bytes", "earlier"])
def test_a_directory_and_a_full_temporary_directory_are_said(
    servers: Servers, mine: dict[str, str], tmp_path: Path, count: int
) -> None:
    """Nothing is enqueued, and the exit code is 2."""
    done = run(servers, "enqueue", str(tmp_path), **mine)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}: Is a directory\n")
    sent, limit = batches(count), "ulimit -f 1100; trap '' XFSZ; "
    words = ["-c", MAIN.format(module="producers.cli"), "enqueue", "-"]
    full = subprocess.run(
        ["bash", "-c", f'{limit} exec "$0" "$@"', sys.executable, *words],
        input=sent,
        capture_output=True,
        timeout=60,
        env=environment(servers, **mine),
    )
    assert (full.returncode, full.stdout) == (2, b"")
    assert full.stderr.startswith(b"error: the temporary directory can't be used: File too large")


def test_line_numbers_count_blank_lines_and_one_byte_order_mark_is_skipped(
    servers: Servers, mine: dict[str, str]
) -> None:
    """As an editor counts them; a second mark, or one in another line, is wrong."""
    good, mark = batches(1), b"\xef\xbb\xbf"
    sent = mark + good + b"\n \r\n" + b"hello\n" + mark + good + good.replace(b"\n", b"\r\n")
    done = shell(servers, "", "enqueue", "-", stdin=sent, **mine)
    said = "the message is not JSON (column 1)"
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        f"error: line 4: {said}",
        f"error: line 5: {said}",
        "error: nothing was enqueued: 2 of 4 lines are wrong",
    ]
    for more in ([], ["--unchecked"]):
        done = shell(servers, "", "enqueue", "-", *more, stdin=mark + good, **mine)
        assert (done.returncode, done.stdout) == (0, b"1 batches enqueued\n")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"tags": [}', "not JSON (column 11)"),
        (b'{"tags": []', "not JSON (column 12)"),
        ('{"é🎉": 1,}'.encode(), "not JSON (column 10)"),
        (b'{"\xc3\xa9": "\xff"}', "not UTF-8 (column 8)"),
        (b"{} {}", "not JSON (column 4)"),
        (b"[" + b"1" * 5000 + b",]", "not JSON (column 5003)"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_line_that_is_no_json_says_where(
    servers: Servers, mine: dict[str, str], line: bytes, fault: str
) -> None:
    """The column counts characters from 1; what is nested too deep has none."""
    done = shell(servers, "", "enqueue", "-", stdin=line + b"\n", **mine)
    first, _ = done.stderr.decode().splitlines()
    assert first == f"error: line 1: the message is {fault}"


def test_a_line_that_no_message_may_have_is_refused(
    servers: Servers, unread: dict[str, str], quiet_redis: Redis, organization: UUID
) -> None:
    """It is not cut and sent, and the lines behind it keep their numbers."""
    huge = b'{"x": "' + b"x" * (9 * 1024 * 1024) + b'"}\n'
    said = "the message is not JSON (column 1)"
    done = shell(servers, "", "enqueue", "-", stdin=batches(1) + huge + b"x\n", **unread)
    assert (done.returncode, done.stderr.decode().splitlines()) == (
        2,
        [
            "error: line 2: the message must not be larger than 1048576 bytes",
            f"error: line 3: {said}",
            "error: nothing was enqueued: 2 of 3 lines are wrong",
        ],
    )
    sent = batches(501) + huge
    done = shell(servers, "", "enqueue", "-", "--unchecked", stdin=sent, **unread)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: line 502: the message must not be larger")
    assert done.stderr.endswith(b"; 500 batches were enqueued, up to line 500\n")
    assert quiet_redis.xlen(Inbox(quiet_redis, organization)._inbox) == 500


@pytest.mark.parametrize("more", [[], ["--unchecked"], ["--wait"]])
def test_what_was_not_sent_is_said(
    servers: Servers, unread: dict[str, str], more: list[str]
) -> None:
    """An inbox for 3 of 5 batches; line 2 is blank."""
    sent = b"\n".join(batches(5).split(b"\n", 1)[:1]) + b"\n\n" + batches(4)
    unread["TASK_TAGS_INBOX_LIMIT"] = "3"
    done = shell(servers, "", "enqueue", "-", *more, stdin=sent, **unread)
    of = "" if more == ["--unchecked"] else " of 5"
    said = f"error: the inbox is full: 3{of} batches were enqueued, up to line 4\n"
    assert (done.returncode, done.stderr.decode()) == (4, said)


def test_an_interrupted_run_says_what_was_sent(
    servers: Servers, unread: dict[str, str], quiet_redis: Redis, organization: UUID, space: Path
) -> None:
    """Ctrl-C while it waits for room: exit code 130, and one line."""
    file = space / "batches.jsonl"
    file.write_bytes(batches(3))
    words = ["enqueue", str(file), "--block", "60"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN.format(module="producers.cli"), *words],
        env=environment(servers, **unread, TASK_TAGS_INBOX_LIMIT="2"),
        stderr=subprocess.PIPE,
    )
    inbox = Inbox(quiet_redis, organization)._inbox
    eventually(lambda: quiet_redis.xlen(inbox) == 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.startswith(b"error: interrupted: ")
    assert stderr.count(b"\n") == 1


# --- Memory --------------------------------------------------------------------------------------


def peak(servers: Servers, file: Path, *arguments: str, code: int, **values: str) -> float:
    """Enqueue a file; return the most memory that the process had, in MiB."""
    program = (
        "import os, sys\nfrom producers.cli import main\n"
        "from tests.support.memory import max_resident\n"
        "try: main()\n"
        "finally: open(sys.argv[2] + '.peak', 'w').write(str(max_resident(os.getpid())))\n"
    )
    with file.open("rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-c", program, "enqueue", str(file), *arguments],
            stdin=stdin,
            capture_output=True,
            timeout=110,
            env=environment(servers, **values),
        )
    assert done.returncode == code, done.stderr[-500:]
    return float(file.with_name(f"{file.name}.peak").read_text())


@pytest.mark.parametrize(
    ("more", "kib", "code"),
    [([], 1, 0), ([], 700, 0), (["--unchecked"], 700, 0), (["--wait"], 700, 1)],
    ids=["small lines", "large lines", "unchecked", "awaited"],
)
def test_a_large_file_does_not_need_large_memory(
    servers: Servers,
    mine: dict[str, str],
    unread: dict[str, str],
    quiet_redis: Redis,
    space: Path,
    more: list[str],
    kib: int,
    code: int,
) -> None:
    """50 MB take less than 30 MiB more than one line, in all ways of sending them."""
    values = (mine if "--wait" in more else unread) | {"TASK_TAGS_INBOX_LIMIT": "1000000"}
    texts = ["x" * 7000] * (kib // 7) or ["x" * 800]
    one, all = space / "one.jsonl", space / "all.jsonl"
    with all.open("wb") as stream:
        while stream.tell() < 50_000_000:
            operations = [add(uuid4(), "t", "t", str(i), text) for i, text in enumerate(texts)]
            line = TagBatch(tags=operations).encode() + b"\n"
            stream.write(line)
    one.write_bytes(line)
    least = peak(servers, one, *more, code=code, **values)
    most = peak(servers, all, *more, code=code, **values)
    quiet_redis.flushdb()
    assert most - least < 30


# --- Encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=lambda values: " ".join(values),
)
def test_what_an_output_cannot_encode_is_escaped(
    servers: Servers, mine: dict[str, str], producer: TagProducer, values: dict[str, str]
) -> None:
    """For people; JSON is the same UTF-8 for every terminal."""
    if "LC_ALL" in values and not sys.prefix.isascii():
        pytest.skip("Python can't read the path of a checkout that is not ASCII in such a locale")
    execution, tag = uuid4(), "é→🎉"
    producer.register(execution)
    producer.batch().add(execution, "t", "t", tag).apply()
    encoding = {"ascii": "ascii", "latin-1": "latin-1"}.get(values.get("PYTHONIOENCODING", ""))
    if "PYTHONUTF8" in values:
        encoding = "ascii"
    escaped = {
        "ascii": rb"\u00e9\u2192\ud83c\udf89",
        "latin-1": b"\xe9" + rb"\u2192\ud83c\udf89",
        None: tag.encode(),
    }[encoding]
    for words in (["list", str(execution)], ["list", tag], ["enqueue", tag]):
        done = shell(servers, "2>&1", *words, **mine, **values)
        assert done.returncode == (0 if words[1] == str(execution) else 2)
        assert b"Traceback" not in done.stdout
        assert words[1] == tag or escaped in done.stdout
    as_json = shell(servers, "", "list", str(execution), "--json", **mine, **values)
    assert json.loads(as_json.stdout)["tag"] == tag
    assert tag.encode() in as_json.stdout


# --- The environment -----------------------------------------------------------------------------

UNUSABLE = {
    "HTTP_PROXY": "foo://user:hunter2@proxy",
    "HTTPS_PROXY": "http://user:hunter2@proxy:port",
    "ALL_PROXY": "socks5://user:hunter2@proxy:1",
    "NO_PROXY": "[::1",
    "SSL_CERT_FILE": "/missing.pem",
    "SSLKEYLOGFILE": "/missing/keys",
}


@pytest.mark.parametrize(
    ("name", "command"),
    [*((name, "list {id}") for name in UNUSABLE), ("HTTP_PROXY", "watch {id} --after 0")],
)
def test_an_environment_that_cannot_be_used_is_exit_code_2(
    servers: Servers, mine: dict[str, str], name: str, command: str
) -> None:
    """One line names the variable, and no password; an endpoint on this machine needs neither."""
    values = mine | {name: UNUSABLE[name], name.lower(): UNUSABLE[name]}
    away = {"TASK_TAGS_ENDPOINT_URL": "http://endpoint.invalid"}
    words = command.format(id=uuid4()).split()
    done = run(servers, *words, **{**values, **away})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert name in done.stderr
    assert "hunter2" not in done.stderr
    if name != "SSLKEYLOGFILE":
        assert "the flow execution is unknown" in run(servers, *words, **values).stderr


@pytest.mark.parametrize(
    "url", ["localhost:8080", "nonsense", "http://", "http://h:port", "ftp://h"]
)
def test_an_endpoint_url_without_a_scheme_is_exit_code_2(
    servers: Servers, mine: dict[str, str], url: str
) -> None:
    """And one line that names the setting."""
    words = ["enqueue", os.devnull] if url == "nonsense" else ["list", str(uuid4())]
    done = run(servers, *words, **mine, TASK_TAGS_ENDPOINT_URL=url)
    said = "error: TASK_TAGS_ENDPOINT_URL: must be like http://host:8080\n"
    assert (done.returncode, done.stderr) == (2, said)
