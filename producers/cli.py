"""The command `task-tags`: enqueue messages, read tags, watch changes and results, print schemas.

Exit codes: 0 done; 1 a batch was refused; 2 wrong input or settings; 3 Redis or the endpoint can't
be used; 4 the inbox is full (with --block: at the end of that time); 5 no result in time; 130
interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import httpx
import typer

from producers import console
from producers.client import TagProducer
from producers.contract.encoding import parse_message
from producers.contract.errors import InvalidMessage, describe
from producers.contract.messages import Message
from producers.contract.results import ResultRecord
from producers.contract.schemas import asyncapi_document, json_schemas
from producers.endpoint import client_options, error_summary
from producers.errors import (
    ConfigurationError,
    InboxFull,
    ResultTimeout,
    TaskTagsError,
    Unavailable,
)
from producers.settings import load_settings
from producers.subscriber import Subscriber

REFUSED: Final = 1
WRONG: Final = 2
UNAVAILABLE: Final = 3
FULL: Final = 4
NO_RESULT: Final = 5

_PIECE: Final = 500

app = typer.Typer(
    help="Enqueue tag batches, read tags, and watch changes and results.",
    epilog="Settings: TASK_TAGS_REDIS_URL, TASK_TAGS_ENDPOINT_URL, TASK_TAGS_ORGANIZATION_ID, "
    "TASK_TAGS_TOKEN. Exit codes: 0 done; 1 a batch was refused; 2 wrong input or settings; "
    "3 Redis or the endpoint can't be used; 4 the inbox is full; 5 no result in time; "
    "130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    try:
        app()
    except ConfigurationError as error:
        console.fail(WRONG, error)
    except (Unavailable, httpx.TransportError, httpx.InvalidURL) as error:
        console.fail(UNAVAILABLE, error)
    except InboxFull as error:
        console.fail(FULL, error)
    except ResultTimeout as error:
        console.fail(NO_RESULT, error)
    except TaskTagsError as error:
        console.fail(REFUSED, error)


@app.command()
def enqueue(
    file: Annotated[
        str, typer.Argument(help="JSON Lines, one message per line; - for standard input.")
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the results and print them.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each result.")] = 30,
    block: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="Wait for free capacity in the inbox, so long in total."
        ),
    ] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Send lines unchanged; the worker checks them.")
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Enqueue the messages of a file, in order. Nothing is sent if a line is wrong."""
    if wait and unchecked:
        console.fail(WRONG, "--wait can't be combined with --unchecked")
    lines = _read_lines(file)
    messages = [] if unchecked else _parse_lines(lines)
    deadline = time.monotonic() + (block or 0)
    with TagProducer() as producer:
        if wait:
            sys.exit(_print_results(_submit(producer, messages, deadline), timeout, as_json))
        encoded = lines if unchecked else [message.encode() for message in messages]
        for start in console.progress(range(0, len(encoded), _PIECE)):
            piece = encoded[start : start + _PIECE]
            accepted = producer.send(piece, deadline - time.monotonic())
            if accepted < len(piece):
                sent = f"{start + accepted} of {len(encoded)}"
                console.fail(FULL, f"the inbox is full: {sent} batches were enqueued")
    done = json.dumps({"enqueued": len(encoded)})
    console.show(f"{len(encoded)} batches enqueued", [done], as_json)


@app.command(name="list")
def list_tags(
    execution: Annotated[UUID, typer.Argument(help="The flow execution's id.")],
    task: Annotated[str | None, typer.Option(help="Only this task's tags.")] = None,
    as_json: console.AsJson = False,
) -> None:
    """Read the active tags of a flow execution from the endpoint."""
    settings = load_settings()
    query = {"flow_execution_id": str(execution), **({"task_name": task} if task else {})}
    with httpx.Client(**client_options(settings.endpoint_url, settings.required_token)) as client:
        response = client.get("/task-tags", params=query)
    if response.status_code != 200:
        code = UNAVAILABLE if response.status_code >= 500 else REFUSED
        console.fail(code, error_summary(response))
    tags: list[dict[str, Any]] = response.json()
    lines = (json.dumps(tag, ensure_ascii=False) for tag in tags)
    console.show(console.tag_table(tags) if tags else "no active tags", lines, as_json)


@app.command()
def watch(
    execution: Annotated[UUID, typer.Argument(help="The flow execution's id.")],
    after: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="REVISION",
            help="Print all changes after this revision, without gaps: those that are missed are "
            "read from the endpoint.",
        ),
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Print the changes of a flow execution as they are published, until interrupted."""
    with Subscriber() as subscriber:
        for event in subscriber.changes(execution, after):
            line = json.dumps(json.loads(event.encode()), ensure_ascii=False)
            console.show(console.change_lines(event), [line], as_json)


@app.command()
def results(
    reply_to: Annotated[str, typer.Argument(help="The reply_to of the messages, or a batch id.")],
    as_json: console.AsJson = False,
) -> None:
    """Print results as they are published, until interrupted."""
    with Subscriber() as subscriber:
        for record in subscriber.results(reply_to):
            _print_record(record, as_json)


@app.command()
def schema(
    asyncapi: Annotated[
        bool,
        typer.Option(
            "--asyncapi",
            help="Print the AsyncAPI document of inbox, results and changes as YAML instead.",
        ),
    ] = False,
) -> None:
    """Print the JSON Schemas of messages, results and change events."""
    document = asyncapi_document() if asyncapi else json.dumps(json_schemas(), indent=2) + "\n"
    typer.echo(document, nl=False)


def _print_record(record: ResultRecord, as_json: bool) -> None:
    console.show(console.result_line(record), [record.encode().decode()], as_json)


# --- Enqueuing -----------------------------------------------------------------------------------


def _read_lines(file: str) -> list[bytes]:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        console.fail(WRONG, f"{file}: {error.strerror}")
    return [line for line in raw.split(b"\n") if line.strip()]


def _parse_lines(lines: Sequence[bytes]) -> list[Message]:
    messages, wrong = [], 0
    for number, line in enumerate(lines, 1):
        try:
            messages.append(parse_message(line))
        except InvalidMessage as error:
            wrong += 1
            for detail in error.details[:20]:
                console.print_error(f"line {number}: {describe(detail)}")
    if wrong:
        console.fail(WRONG, f"nothing was enqueued: {wrong} of {len(lines)} lines are wrong")
    return messages


Submitted = Iterator[tuple[Message, Future[ResultRecord]]]


def _submit(producer: TagProducer, messages: Sequence[Message], deadline: float) -> Submitted:
    """Submit messages, at most `_PIECE` ahead of the results, so that these fit in the inbox.

    Args:
        deadline: On the monotonic clock; until then, wait for free capacity in the inbox.
    """
    waiting: deque[tuple[Message, Future[ResultRecord]]] = deque()
    for message in console.progress(messages):
        waiting.append((message, producer.submit(message, deadline - time.monotonic())))
        if len(waiting) == _PIECE:
            yield waiting.popleft()
    yield from waiting


def _print_results(submitted: Submitted, timeout: float, as_json: bool) -> int:
    """Print results in order, each after so many seconds at most, and return the exit code."""
    code = 0
    for message, result in submitted:
        try:
            record = result.result(timeout)
        except FutureTimeout:
            result.cancel()
            console.print_error(f"{message.batch_id}: no result in {timeout:g} s")
            code = NO_RESULT
        else:
            _print_record(record, as_json)
            code = REFUSED if record.error is not None else code
    return code
