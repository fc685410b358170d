"""The commands as a person runs them: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from producers.client import TagProducer
from producers.console import escape_terminal
from producers.contract.messages import (
    RegisterExecution,
    TagBatch,
    add,
    register_execution,
    set_task_state,
)
from producers.contract.schemas import asyncapi_document
from producers.errors import NotFound
from tests.support.commands import environment, run
from tests.support.servers import Servers
from tests.support.waiting import eventually

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
NO_STACK = ("--data-dir", "/nowhere")
HOSTILE = {
    "TASK_TAGS_REDIS_URL": "garbage",
    "TASK_TAGS_DATABASE_URL": "garbage",
    "TASK_TAGS_ENDPOINT_URL": "garbage",
    "TASK_TAGS_JWT_SECRET": "short",
    "TASK_TAGS_JWT_ALGORITHMS": "none",
}


@pytest.fixture
def mine(servers: Servers, organization: UUID, token: str) -> dict[str, str]:
    """Settings of the test's own organization."""
    return {"TASK_TAGS_ORGANIZATION_ID": str(organization), "TASK_TAGS_TOKEN": token}


def lines(*messages: Any) -> str:
    return "".join(message.encode().decode() + "\n" for message in messages)


def test_batches_are_enqueued_and_awaited(servers: Servers, mine: dict[str, str]) -> None:
    """From standard input, results in order, as JSON for programs and as lines for people."""
    execution = uuid4()
    batch = TagBatch(tags=[add(execution, "t", "t", "é"), add(execution, "t", "t", "é")])
    sent = lines(register_execution(execution), batch)
    done = run(servers, "enqueue", "-", "--wait", "--json", stdin=sent, **mine)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert records[0]["flow_execution"] == {"status": "registered"}
    assert [result["status"] for result in records[1]["tags"]] == ["added", "already_exists"]
    again = run(servers, "enqueue", "-", "--wait", stdin=sent, **mine)
    assert f"{batch.batch_id}  added, already_exists" in again.stdout
    listed = run(servers, "list", str(execution), **mine)
    assert (listed.returncode, "é" in listed.stdout) == (0, True)
    as_json = run(servers, "list", str(execution), "--task", "t", "--json", **mine)
    assert json.loads(as_json.stdout)["tag"] == "é"


def test_a_refused_batch_is_exit_code_1(servers: Servers, mine: dict[str, str]) -> None:
    """And the reason is shown."""
    sent = lines(TagBatch(tags=[add(uuid4(), "t", "t", "x")]))
    done = run(servers, "enqueue", "-", "--wait", stdin=sent, **mine)
    assert done.returncode == 1
    assert "not_found" in done.stdout
    assert "operation 0, flow_execution_id: is unknown" in done.stdout


def test_nothing_is_sent_if_a_line_is_wrong(servers: Servers, mine: dict[str, str]) -> None:
    """Each fault with its line; exit code 2."""
    sent = lines(register_execution(uuid4())) + 'hello\n{"kind": "x"}\n'
    done = run(servers, "enqueue", "-", stdin=sent, **mine)
    assert done.returncode == 2
    assert "line 2: the message is not JSON (column 1)" in done.stderr
    assert (
        "line 3: kind: must be 'tag_batch' or 'flow_execution' or 'task_execution'" in done.stderr
    )
    assert "nothing was enqueued: 2 of 3 lines are wrong" in done.stderr


@pytest.mark.parametrize("name", ["task-tags", "task-tags-admin"])
def test_the_version_is_that_of_the_package(name: str) -> None:
    command = Path(sys.executable).with_name(name)
    said = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, f"task-tags {version('task-tags')}\n")
    assert "--version" in subprocess.run([command, "--help"], capture_output=True, text=True).stdout


# --- Lines that people write ---------------------------------------------------------------------


def readme_lines() -> str:
    """Return the lines of batches.jsonl that the README shows."""
    block = (REPOSITORY / "README.md").read_text("utf-8").partition("<<END\n")[2]
    return block.partition("END\n")[0].replace("$ID", str(uuid4()))


def test_the_lines_of_the_readme_are_taken_as_they_are(
    servers: Servers, mine: dict[str, str]
) -> None:
    """Without version, kind and id. The id that a line gets is printed, and is the result's."""
    sent = readme_lines()
    done = run(servers, "enqueue", "-", "--wait", "--json", stdin=sent, **mine)
    assert (done.returncode, done.stderr) == (0, "")
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    new = [each for each in printed if "line" in each]
    results = [each for each in printed if "line" not in each]
    assert [each["line"] for each in new] == [1, 2, 3]
    assert [each["batch_id"] for each in results] == [each["batch_id"] for each in new]
    assert {UUID(each["batch_id"]).version for each in new} == {7}
    assert results[0]["flow_execution"] == {"status": "registered"}
    assert results[1]["task_execution"] == {"status": "recorded"}
    assert [each["status"] for each in results[2]["tags"]] == ["added"]
    again = run(servers, "enqueue", "-", stdin="\n" + sent, **mine)
    assert [line.split(": batch ")[0] for line in again.stdout.splitlines()] == [
        *("line 2", "line 3", "line 4", "3 batches enqueued")
    ]


def test_a_run_with_derived_ids_may_be_repeated(servers: Servers, mine: dict[str, str]) -> None:
    """The same name and file are the same batches; another name, or a changed line, are others."""
    execution, own = uuid4(), uuid4()
    operation = {"operation": "add", "flow_execution_id": str(execution), "task_name": "t"}
    tag = {"tags": [operation | {"tag_type": "t", "tag": "x"}]}
    fields = [{"flow_execution_id": str(execution)}, tag, tag | {"batch_id": str(own)}, tag]
    sent = [json.dumps(each) for each in fields]

    def outcomes(sent: list[str], name: str) -> tuple[int, list[str], list[str]]:
        words = ["enqueue", "-", "--wait", "--ids-from", name]
        done = run(servers, *words, stdin="\n".join(sent), **mine)
        assert done.stderr == ""
        printed = [line for line in done.stdout.splitlines() if not line.startswith("line ")]
        ids, texts = zip(*(line.split("  ") for line in printed), strict=True)
        assert ids[2] == str(own)
        assert {UUID(id).version for id in (ids[0], ids[1], ids[3])} == {5}
        return done.returncode, list(ids), list(texts)

    texts = ["registered", "added", "already_exists", "already_exists"]
    first = outcomes(sent, "run 1")
    assert first == (0, first[1], texts)
    assert outcomes(sent, "run 1") == first
    _, ids, other = outcomes(sent, "run 2")
    assert set(ids) & set(first[1]) == {str(own)}
    assert other[:2] == ["already_exists", "already_exists"]
    code, ids, changed = outcomes([*sent[:3], sent[3].replace('"x"', '"y"')], "run 1")
    assert (code, ids, changed[:3]) == (1, first[1], texts[:3])
    assert changed[3].startswith("conflict")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "must have 'tags' or 'state' or 'flow_execution_id'"),
        ('{"kind": null, "tags": []}', "kind: must be 'tag_batch' or"),
        ('{"batch_id": null, "tags": []}', "batch_id: must be a UUID"),
        ('{"schema_version": 2, "flow_execution_id": "{id}"}', "schema_version: must be 1"),
        ('{"flow_execution_id": "{id}", "state": "queued"}', "task_name: is required"),
        ('{"flow_execution_id": "{id}", "tags": 1, "tags": 2}', "the same key twice"),
        ('{"flow_execution_id": "{id}", "task_name": "t"}', "task_name: is not a known field"),
    ],
)
def test_what_is_left_out_is_filled_in_and_nothing_is_guessed(
    servers: Servers, mine: dict[str, str], line: str, said: str
) -> None:
    """A field that is there is checked as ever."""
    done = run(servers, "enqueue", "-", stdin=line.replace("{id}", str(uuid4())), **mine)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"line 1: {said}" in done.stderr or said in done.stderr


def test_a_file_is_enqueued_without_waiting(
    servers: Servers, mine: dict[str, str], space: Path
) -> None:
    """The sample, as it is: the worker answers what is wrong with a line."""
    done = run(servers, "enqueue", "--unchecked", str(EXAMPLES / "document-review.jsonl"), **mine)
    assert (done.returncode, done.stdout) == (0, "42 batches enqueued\n")
    assert run(servers, "enqueue", str(space / "none.jsonl"), **mine).returncode == 2


@pytest.mark.parametrize("wait", [(), ("--wait", "--json"), ("--unchecked",)])
def test_a_full_inbox_is_waited_for_as_long_as_one_says(
    servers: Servers, mine: dict[str, str], wait: tuple[str, ...]
) -> None:
    """Four batches, an inbox for one: with --block they wait for space, else the exit code is 4."""
    limited = {**mine, "TASK_TAGS_INBOX_LIMIT": "1"}
    sent = lines(*[register_execution(uuid4()) for _ in range(4)])
    done = run(servers, "enqueue", "-", "--block", "20", *wait, stdin=sent, **limited)
    assert (done.returncode, done.stderr) == (0, "")
    limited["TASK_TAGS_REDIS_URL"] = servers.stack.redis_url.replace("db=0", "db=1")
    full = run(servers, "enqueue", "-", "--block", "0.1", *wait, stdin=sent, **limited)
    assert full.returncode == 4
    assert "the inbox is full" in full.stderr


NO_REDIS = "Redis can't be used (TASK_TAGS_REDIS_URL)"
NO_ENDPOINT = "the endpoint at http://127.0.0.1:1 can't be used (TASK_TAGS_ENDPOINT_URL)"


@pytest.mark.parametrize(
    ("arguments", "values", "code", "said"),
    [
        (("enqueue", "-"), {"TASK_TAGS_TOKEN": ""}, 2, "TASK_TAGS_TOKEN is not set"),
        (("enqueue", "-"), {"TASK_TAGS_ORGANIZATION_ID": "x"}, 2, "TASK_TAGS_ORGANIZATION_ID"),
        (("enqueue", "-"), {"TASK_TAGS_REDIS_URL": "unix:///nowhere"}, 3, NO_REDIS),
        (("list", "{id}"), {"TASK_TAGS_ENDPOINT_URL": "http://127.0.0.1:1"}, 3, NO_ENDPOINT),
        (("watch", "--all"), {"TASK_TAGS_ENDPOINT_URL": "http://127.0.0.1:1"}, 3, NO_ENDPOINT),
        (("find", "--with", "t"), {"TASK_TAGS_ENDPOINT_URL": "http://127.0.0.1:1"}, 3, NO_ENDPOINT),
        (("watch", "--all", "--after", "9-abc"), {}, 1, "continue from `cursor` 0"),
        (("list", "{id}"), {"TASK_TAGS_TOKEN": "garbage"}, 1, "the token is not valid"),
        (("list", "{id}"), {}, 1, "the flow execution is unknown"),
        (("enqueue", "-"), {"TASK_TAGS_REDIS_URL": "garbage"}, 2, "TASK_TAGS_REDIS_URL"),
        (("watch", "{id}"), {"TASK_TAGS_REDIS_URL": "unix:///nowhere"}, 3, NO_REDIS),
        (("results", "r"), {"TASK_TAGS_REDIS_URL": "unix:///nowhere"}, 3, NO_REDIS),
        (("list", "not-a-uuid"), {}, 2, "Invalid value for 'execution'"),
        (
            ("enqueue", "-", "--wait", "--timeout", "0.2"),
            {"TASK_TAGS_REDIS_URL": "quiet"},
            5,
            "no result",
        ),
        (("nonsense",), {}, 2, "No such command"),
        (("enqueue", "-", "--block", "-1"), {}, 2, "--block"),
        (("enqueue", "-", "--block", "nan"), {}, 2, "nan is not in the range 0 to 604,800"),
        (("enqueue", "-", "--ids-from", " "), {}, 2, "must be printable text"),
        (("enqueue", "-", "--ids-from", "\udcff"), {}, 2, "must be printable text"),
        (("enqueue", "-", "--ids-from", "x", "--unchecked"), {}, 2, "can't be combined"),
        (("list", "{id}", "--task", "\udcff"), {}, 2, "an argument is not UTF-8"),
        (("results", "\udcff"), {}, 2, "reply_to: must be 1 to 200 of the characters"),
        (("results", "a b"), {}, 2, "reply_to: must be 1 to 200 of the characters"),
    ],
)
def test_an_error_is_one_clear_line(
    servers: Servers,
    mine: dict[str, str],
    arguments: tuple[str, ...],
    values: dict[str, str],
    code: int,
    said: str,
) -> None:
    """No traceback, and the exit code that the help promises."""
    if values.get("TASK_TAGS_REDIS_URL") == "quiet":
        values = {"TASK_TAGS_REDIS_URL": servers.stack.redis_url.replace("db=0", "db=1")}
    words = [word.format(id=uuid4()) for word in arguments]
    done = run(servers, *words, stdin=lines(register_execution(uuid4())), **{**mine, **values})
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seconds", ["-5", "0", "nan", "inf", "1e300", "604801", "soon", ""])
def test_a_timeout_that_cannot_be_waited_is_refused_before_anything_is_enqueued(
    servers: Servers, mine: dict[str, str], producer: TagProducer, seconds: str
) -> None:
    """Exit code 2, and the execution that would have been registered is unknown."""
    execution = uuid4()
    sent = lines(register_execution(execution))
    done = run(servers, "enqueue", "-", "--wait", "--timeout", seconds, stdin=sent, **mine)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Invalid value for '--timeout'" in done.stderr
    with pytest.raises(NotFound):
        producer.batch().add(execution, "t", "t", "x").apply()


@pytest.mark.parametrize("command", ["watch", "results"])
def test_changes_and_results_are_followed_until_interrupted(
    servers: Servers, mine: dict[str, str], producer: TagProducer, organization: UUID, command: str
) -> None:
    """Printed as they are published; Ctrl-C ends it with 130 and no traceback."""
    execution = uuid4()
    producer.apply(register_execution(execution))
    subject = str(execution) if command == "watch" else "runner-7"
    code = "from producers.cli import main; main()"
    follower = subprocess.Popen(
        [sys.executable, "-c", code, command, subject, "--json"],
        env=environment(servers, **mine),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    kind = "changes" if command == "watch" else "results"
    channel = f"task-tags:{{{organization}}}:{kind}:{subject}"
    redis: Any = producer._enqueuer.redis
    eventually(lambda: redis.pubsub_numsub(channel)[0][1])
    batch = TagBatch(reply_to="runner-7", tags=[add(execution, "t", "t", "x")])
    producer.enqueue(batch)
    assert follower.stdout is not None
    received = json.loads(follower.stdout.readline())
    assert received["batch_id"] == str(batch.batch_id)
    follower.send_signal(signal.SIGINT)
    _, stderr = follower.communicate(timeout=20)
    assert (follower.returncode, stderr) == (130, "")


@pytest.mark.parametrize("module", ["producers", "worker"])
def test_an_interrupt_while_a_command_is_being_imported_leaves_no_traceback(
    module: str, tmp_path: Path
) -> None:
    """As when somebody presses Ctrl-C at once."""
    (tmp_path / "typer.py").write_text("print('importing', flush=True)\nwhile True: pass")
    path = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    with subprocess.Popen(
        [sys.executable, "-m", module],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as command:
        assert command.stdout is not None
        try:
            assert command.stdout.readline() == b"importing\n"
            command.send_signal(signal.SIGINT)
            _, stderr = command.communicate(timeout=20)
        finally:
            command.kill()
    assert (command.returncode, stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "{} is unknown so far: its changes are printed from now on\n"),
        ({"TASK_TAGS_ENDPOINT_URL": "http://127.0.0.1:1"}, ""),
        (
            {"TASK_TAGS_TOKEN": "nonsense"},
            "the endpoint refuses the token, so it is not known whether the execution exists: its "
            "changes are printed from now on\n",
        ),
    ],
)
def test_a_watch_of_an_unknown_execution_says_so_and_goes_on(
    servers: Servers,
    mine: dict[str, str],
    producer: TagProducer,
    organization: UUID,
    more: dict[str, str],
    said: str,
) -> None:
    """If the endpoint can be asked; the watch itself needs Redis alone."""
    execution = uuid4()
    mine = {**mine, **more}
    with subprocess.Popen(
        [sys.executable, "-c", "from producers.cli import main; main()", "watch", str(execution)],
        env=environment(servers, **mine),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        channel = f"task-tags:{{{organization}}}:changes:{execution}"
        redis: Any = producer._enqueuer.redis
        eventually(lambda: redis.pubsub_numsub(channel)[0][1])
        producer.enqueue(register_execution(execution))
        producer.batch().add(execution, "t", "t", "x").enqueue()
        assert follower.stdout is not None
        assert follower.stdout.readline().startswith(f"{execution} #1  + t  t: x")
        follower.send_signal(signal.SIGINT)
        _, stderr = follower.communicate(timeout=20)
    assert (follower.returncode, stderr) == (130, said.format(execution))


def test_tasks_are_found_by_their_tags(
    servers: Servers, mine: dict[str, str], producer: TagProducer
) -> None:
    """As a table for people, as JSON for programs; a limit that hides tasks is told."""
    execution, name = uuid4(), "größe " * 30
    pending = [add(execution, each, "review_status", "pending") for each in ("first", name, "last")]
    sent = lines(
        RegisterExecution(flow_execution_id=execution, flow_id="invoices"),
        TagBatch(tags=[*pending, add(execution, "last", "a:b", "c:d")]),
        set_task_state(execution, "first", "running"),
    )
    assert run(servers, "enqueue", "-", "--wait", stdin=sent, **mine).returncode == 0

    found = run(servers, "find", "--with", "review_status:pending", **mine)
    assert (found.returncode, found.stderr) == (0, "")
    header, *rows = found.stdout.splitlines()
    assert header.split() == ["flow", "execution", "task", "state", "waiting", "since", "tags"]
    assert len(rows) == 3
    assert f"invoices  {execution}  first" in rows[0]
    assert name in rows[1]
    assert "review_status: pending, a:b: c:d" in rows[2]

    def names(*options: str) -> list[str]:
        done = run(servers, "find", *options, "--json", **mine)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["task_name"] for line in done.stdout.splitlines()]

    selected = ("--with", "review_status:pending")
    assert names(*selected) == ["first", name, "last"]
    assert names(*selected, "--without", r"a\:b:c:d") == ["first", name]
    assert names(*selected, "--with", r"a\:b") == ["last"]
    assert names(*selected, "--state", "running", "--state", "failed") == ["first"]
    assert names(*selected, "--flow-id", "other") == []
    assert names("--execution", str(execution), "--task-name", "last") == ["last"]
    few = run(servers, "find", *selected, "--limit", "2", **mine)
    assert (len(few.stdout.splitlines()), "the first 2 tasks" in few.stderr) == (3, True)
    none = run(servers, "find", "--with", "review_status:approved", **mine)
    assert none.stdout == "no such tasks\n"
    for options, said in (
        ((), "give --with TYPE:TAG, or --execution ID"),
        (("--with", "review_status"), "with: the first must be type:tag"),
        ((*selected, "--with", ":"), "--with: ':' is not TYPE or TYPE:TAG"),
        ((*selected, "--without", "a:"), "--without: in 'a:', type or tag is empty"),
        ((*selected, "--state", "x"), "state"),
    ):
        wrong = run(servers, "find", *options, **mine)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
        assert said in wrong.stderr
    unknown = run(servers, "find", "--execution", str(uuid4()), **mine)
    assert (unknown.returncode, unknown.stdout) == (1, "")


def test_a_terminal_is_shown_escapes_and_does_not_obey_them() -> None:
    """A tag's text can't clear the screen, set the title or forge a line."""
    assert escape_terminal("\x1b]0;owned\x07\nfake \u202e ok é 🎉") == (
        r"\x1b]0;owned\x07\nfake \u202e ok é 🎉"
    )


def test_the_schemas_are_printed() -> None:
    """For code generators; no settings are needed."""
    done = run(None, "schema")
    assert set(json.loads(done.stdout)) == {"message", "result", "change_event"}


def printed(module: str, command: str) -> bytes:
    """Return what a command prints, under settings that no other command would take."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import main; main()", *command.split()[1:]],
        capture_output=True,
        timeout=60,
        env={**os.environ, **HOSTILE},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_the_checked_in_openapi_document_is_what_the_command_prints() -> None:
    """To the byte, wherever it is run: settings change nothing."""
    command, file = "task-tags-admin openapi", "docs/openapi.json"
    output = printed("worker.cli", command)
    same = output == (REPOSITORY / file).read_bytes()
    assert same, f"{file} is not what it should be; run: .venv/bin/{command} > {file}"
    assert output.endswith(b"\n}\n")


def test_the_asyncapi_document_is_printed_as_it_is_written() -> None:
    """To the byte, wherever it is run: the checked-in file, then the schemas of the models."""
    output = printed("producers.cli", "task-tags schema --asyncapi")
    assert output == asyncapi_document().encode()
    assert output.startswith((REPOSITORY / "producers" / "contract" / "asyncapi.yaml").read_bytes())
    assert output.endswith(b"}\n")


MARK = "eyJmark"
WRONG_TOKENS = (f"{MARK}\nline", f"{MARK}.a.b")


@pytest.mark.parametrize("wrong", WRONG_TOKENS, ids=["line", "jwt"])
def test_no_command_prints_a_token(servers: Servers, wrong: str) -> None:
    """Whatever is wrong with it, and whatever else goes wrong."""
    id = str(uuid4())
    line = json.dumps({"kind": "flow_execution", "flow_execution_id": id})
    commands = [
        *[("enqueue", "-"), ("enqueue", "-", "--unchecked"), ("enqueue", "-", "--wait")],
        *[("list", id), ("watch", id, "--after", "0")],
    ]
    values = {"TASK_TAGS_ORGANIZATION_ID": id, "TASK_TAGS_TOKEN": wrong}
    for command in commands:
        done = run(servers, *command, stdin=line + "\n", **values)
        # What has the form of a JWT is accepted, and refused by the worker.
        assert done.returncode != 0 or (wrong == WRONG_TOKENS[-1] and "--wait" not in command)
        assert MARK not in done.stdout + done.stderr, command


def test_a_token_is_minted_for_development(servers: Servers, organization: UUID) -> None:
    """What the administrator's command signs is taken by the endpoint."""
    secret = servers.settings.jwt_secret
    assert secret is not None
    done = run(
        None,
        "token",
        "--org",
        str(organization),
        "--sub",
        "ada",
        "--scope",
        "task-tags:read",
        module="worker.cli",
        TASK_TAGS_JWT_SECRET=secret.get_secret_value(),
    )
    listed = run(
        servers,
        "list",
        str(uuid4()),
        TASK_TAGS_TOKEN=done.stdout.strip(),
        TASK_TAGS_ORGANIZATION_ID=str(organization),
    )
    assert "the flow execution is unknown" in listed.stderr


@pytest.mark.parametrize(
    ("arguments", "values", "code", "said"),
    [
        (("token", "--org", str(uuid4()), *NO_STACK), {}, 2, "TASK_TAGS_JWT_SECRET"),
        (("token", *NO_STACK), {}, 2, "--org is missing"),
        (("token", "--org", "x"), {}, 2, "x"),
        (("token", "--org", str(uuid4()), "--scope", "all"), {}, 2, "there is no scope all"),
        (("migrate",), {"TASK_TAGS_DATABASE_URL": "postgresql://127.0.0.1:1/x"}, 3, "refused"),
        (("endpoint",), {"TASK_TAGS_GROUP_SIZE": "many"}, 2, "TASK_TAGS_GROUP_SIZE"),
        (("demo", "/nowhere.jsonl"), {}, 3, "the sample can't be read"),
        (("migrate",), {"TASK_TAGS_DATABASE_URL": "garbage"}, 2, "TASK_TAGS_DATABASE_URL"),
        (("endpoint",), {"TASK_TAGS_LOG_LEVEL": "loud"}, 2, "TASK_TAGS_LOG_LEVEL"),
        (("up", "--data-dir", "/proc/nowhere"), {}, 3, "/proc/nowhere"),
        (("token", "--org", str(uuid4()), "--days", "1e12"), {}, 2, "--days"),
        (("token", "--org", str(uuid4()), "--days", "nan"), {}, 2, "--days"),
        (("token", "--org", str(uuid4()), "--sub", ""), {}, 2, "--sub"),
        (("token", "--org", str(uuid4()), "--sub", "task-tags:x"), {}, 2, "--sub"),
        (("migrate",), {"TASK_TAGS_WORKER_PASSWORD": " "}, 2, "TASK_TAGS_WORKER_PASSWORD: must"),
        (("migrate",), {"TASK_TAGS_ENDPOINT_PASSWORD": "x" * 9999}, 2, "ENDPOINT_PASSWORD: must"),
        (("migrate",), {"TASK_TAGS_WORKER_PASSWORD": "\udcff"}, 2, "WORKER_PASSWORD: must"),
        (("endpoint", "--host", "a..b"), {"TASK_TAGS_JWT_SECRET": "s" * 32}, 2, "name of a host"),
        (("rejected", "retry", "--org", str(uuid4()), "x"), {"TASK_TAGS_TOKEN": " "}, 2, "TOKEN"),
    ],
)
def test_an_administrators_error_is_one_clear_line(
    arguments: tuple[str, ...], values: dict[str, str], code: int, said: str
) -> None:
    """As for users."""
    done = run(None, *arguments, module="worker.cli", **values)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_progress_bar_is_for_terminals_alone(servers: Servers, mine: dict[str, str]) -> None:
    """In a pipe there is nothing but the result."""
    begin = time.monotonic()
    sent = lines(*[register_execution(uuid4()) for _ in range(1200)])
    done = run(servers, "enqueue", "-", "--json", stdin=sent, **mine)
    assert (done.stdout, done.stderr) == ('{"enqueued": 1200}\n', "")
    assert time.monotonic() > begin
