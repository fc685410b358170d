"""The command `task-tags`: enqueue messages, find tasks, list tags, watch, print schemas.

Exit codes: 0 done; 1 a batch or a request was refused; 2 wrong input or settings; 3 Redis or the
endpoint can't be used; 4 the inbox is full (with --block: at the end of that time); 5 no result in
time; 6 standard output can't be written; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Annotated, Any, Final, cast
from uuid import UUID

import httpx
import typer
from pydantic_core import to_json

from producers import console
from producers.batch_file import Batch, CheckedBatches, WrongInput, read_unchecked
from producers.client import MAX_TIMEOUT_SECONDS, TagProducer
from producers.contract.encoding import parse_message
from producers.contract.messages import TaskState
from producers.contract.results import ResultRecord
from producers.contract.schemas import asyncapi_document, json_schemas
from producers.contract.selectors import Selector
from producers.endpoint import client_options, error_summary, requesting
from producers.errors import (
    ChangesRefused,
    ConfigurationError,
    InboxFull,
    ResultTimeout,
    TaskTagsError,
    Unavailable,
)
from producers.settings import load_settings
from producers.subscriber import Subscriber
from producers.tag_reader import TagReader

REFUSED: Final = 1
WRONG: Final = 2
UNAVAILABLE: Final = 3
FULL: Final = 4
NO_RESULT: Final = 5
INTERRUPTED: Final = 130

_PIECE: Final = 500
_PIECE_BYTES: Final = 1024 * 1024
_AHEAD_BYTES: Final = 8 * _PIECE_BYTES

app = typer.Typer(
    help="Enqueue tag batches, find tasks, read tags, and watch changes and results.",
    epilog="Settings: TASK_TAGS_REDIS_URL, TASK_TAGS_ENDPOINT_URL, TASK_TAGS_ORGANIZATION_ID, "
    "TASK_TAGS_TOKEN. Exit codes: 0 done; 1 a batch or a request was refused; "
    "2 wrong input or settings; 3 Redis or the endpoint can't be used; 4 the inbox is full; "
    "5 no result in time; 6 standard output can't be written; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.callback()(console.version_option)


def main() -> None:
    console.open_streams()
    try:
        app()
    except (ConfigurationError, WrongInput) as error:
        console.fail(WRONG, error)
    except UnicodeEncodeError:
        console.fail(WRONG, "an argument is not UTF-8")
    except Unavailable as error:
        console.fail(UNAVAILABLE, error)
    except ResultTimeout as error:
        console.fail(NO_RESULT, error)
    except ChangesRefused as error:
        console.fail(WRONG if error.status == 400 else REFUSED, error)
    except TaskTagsError as error:
        console.fail(REFUSED, error)
    except console.OutputFailed as error:
        console.fail(console.OUTPUT_FAILED, error)


def _name(value: str | None) -> str | None:
    if value is not None and not (value.strip() and value.isprintable()):
        raise typer.BadParameter("must be printable text that is not blank")
    return value


Timeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        callback=console.within(0.001, MAX_TIMEOUT_SECONDS),
        help="Time to wait for each result; at most 604800 (a week).",
    ),
]
Block = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        callback=console.within(0, MAX_TIMEOUT_SECONDS),
        help="Total time to wait for free capacity in the inbox; at most 604800 (a week).",
    ),
]
IdsFrom = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=_name,
        help="Derive missing batch ids from NAME and the line number, so that another run with the "
        "same file and NAME changes nothing.",
    ),
]


@app.command()
def enqueue(
    file: Annotated[
        str, typer.Argument(help="JSON Lines, one message per line; - for standard input.")
    ],
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Wait for the results and print them; they say if the token was refused."
        ),
    ] = False,
    timeout: Timeout = 30,
    block: Block = None,
    ids_from: IdsFrom = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Send lines unchanged; the worker checks them.")
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Enqueue the messages of a file, in order. Nothing is sent if a line is wrong.

    A line may omit schema_version, kind and batch_id; a new batch id is printed. With --unchecked,
    lines are not checked, and must have all fields.
    """
    if unchecked and (wait or ids_from):
        console.fail(WRONG, "--unchecked can't be combined with --wait or --ids-from")
    with TagProducer() as producer:
        batches = read_unchecked(file) if unchecked else CheckedBatches(file, ids_from)
        total = batches.total if isinstance(batches, CheckedBatches) else None
        run = _Run(producer, total, block or 0, as_json)
        with run.reporting_progress():
            if wait:
                sys.exit(run.print_results(run.submit(batches), timeout))
            run.send(batches)
            done = json.dumps({"enqueued": run.sent})
            console.show(f"{run.sent} batches enqueued", [done], as_json)


@app.command(name="list")
def list_tags(
    execution: Annotated[UUID, typer.Argument(help="The flow execution's id.")],
    task: Annotated[str | None, typer.Option(help="Only this task's tags.")] = None,
    as_json: console.AsJson = False,
) -> None:
    """Read the active tags of a flow execution from the endpoint."""
    response = _read_tags(execution, {"task_name": task} if task else {})
    if response.status_code != 200:
        code = UNAVAILABLE if response.status_code >= 500 else REFUSED
        console.fail(code, error_summary(response))
    try:
        tags: list[dict[str, Any]] = response.json()
        table = console.tag_table(tags) if tags else "no active tags"
    except (ValueError, LookupError, TypeError):
        raise Unavailable("the endpoint's answer is not a list of tags") from None
    lines = (json.dumps(tag, ensure_ascii=False) for tag in tags)
    console.show(table, lines, as_json)


def _read_tags(execution: UUID, query: dict[str, str], timeout: float = 10) -> httpx.Response:
    settings = load_settings()
    token = settings.required_token
    options = client_options(settings.endpoint_url, lambda: token) | {"timeout": timeout}
    with requesting(), httpx.Client(**options) as client:
        return client.get("/task-tags", params={"flow_execution_id": str(execution), **query})


@app.command()
def find(
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="TYPE:TAG",
            help="Only tasks that have this tag, the longest waiting first; may be repeated; from "
            "the second on, TYPE alone means any tag of the type.",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE[:TAG]", help="Only tasks without this tag; may be repeated."),
    ] = None,
    task_name: Annotated[str | None, typer.Option(help="Only tasks of this name.")] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="STATE", help="Only tasks in this state; may be repeated."),
    ] = None,
    flow_id: Annotated[str | None, typer.Option(help="Only tasks of this flow.")] = None,
    execution: Annotated[
        UUID | None, typer.Option(help="Only tasks of this flow execution.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most tasks to print.")] = 100,
    as_json: console.AsJson = False,
) -> None:
    """Find the tasks that have a tag, in all executions; or read the tasks of one execution.

    In TYPE, write a backslash before : and \\.
    """
    if not with_ and execution is None:
        console.fail(WRONG, "give --with TYPE:TAG, or --execution ID")
    with TagReader() as reader:
        found = reader.work_list(
            _selectors("--with", with_),
            _selectors("--without", without),
            task_name=task_name,
            state=cast(Sequence[TaskState], state or ()),
            flow_id=flow_id,
            flow_execution_id=execution,
        )
        tasks = list(islice(found, limit + 1))
    table = console.task_table(tasks[:limit]) if tasks else "no such tasks"
    console.show(table, (to_json(task).decode() for task in tasks[:limit]), as_json)
    if len(tasks) > limit:
        console.err.print(f"the first {limit} tasks; use --limit for more")


def _selectors(option: str, values: list[str] | None) -> list[Selector]:
    try:
        return [Selector.parse(value) for value in values or ()]
    except ValueError as error:
        raise WrongInput(f"{option}: {error}") from None


@app.command()
def watch(
    execution: Annotated[
        UUID | None, typer.Argument(help="The flow execution's id.", show_default=False)
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Watch all executions of the organization.")
    ] = False,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Print all changes behind this place, without gaps, from the endpoint: a revision "
            "or <revision>-<t>, with --all a cursor. 0 is the beginning; with --all, latest is the "
            "end.",
        ),
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Print the changes of a flow execution, or of all, as they come, until interrupted."""
    if (execution is None) != everything:
        console.fail(WRONG, "give either the id of a flow execution or --all")
    with Subscriber() as subscriber:
        if execution is None:
            events = subscriber.organization_changes(after or "latest")
        else:
            events = subscriber.changes(execution, after)
            if after is None:
                _tell_if_unknown(execution)
        for event in events:
            line = json.dumps(json.loads(event.encode()), ensure_ascii=False)
            console.show(console.change_lines(event), [line], as_json)


def _tell_if_unknown(execution: UUID) -> None:
    """Say on standard error that the endpoint does not know the execution, if it can be asked."""
    with suppress(TaskTagsError):
        response = _read_tags(execution, {"limit": "1"}, timeout=2)
        if response.status_code == 404:
            console.err.print(f"{execution} is unknown so far: its changes are printed from now on")
        elif response.status_code in (401, 403):
            console.err.print(
                "the endpoint refuses the token, so it is not known whether the execution exists: "
                "its changes are printed from now on"
            )


@app.command()
def results(
    reply_to: Annotated[str, typer.Argument(help="The reply_to of the messages, or a batch id.")],
    as_json: console.AsJson = False,
) -> None:
    """Print results as they are published, until interrupted."""
    with Subscriber() as subscriber:
        try:
            records = subscriber.results(reply_to)
        except ValueError as error:
            console.fail(WRONG, error)
        for record in records:
            _print_record(record, as_json)


@app.command()
def schema(
    asyncapi: Annotated[
        bool,
        typer.Option(
            "--asyncapi",
            help="Print the AsyncAPI document of inbox, results and changes, as YAML, instead.",
        ),
    ] = False,
) -> None:
    """Print the JSON Schemas of messages, results and change events."""
    document = asyncapi_document() if asyncapi else json.dumps(json_schemas(), indent=2) + "\n"
    console.write(document)


def _print_record(record: ResultRecord, as_json: bool) -> None:
    console.show(console.result_line(record), [record.encode().decode()], as_json)


# --- Enqueuing -----------------------------------------------------------------------------------


class _Run:
    """One run of `enqueue`: sends batches in order, and knows how many were sent.

    Args:
        total: How many batches there are, if that is known.
        block: Seconds to wait, in total, for free capacity in the inbox.
    """

    def __init__(
        self, producer: TagProducer, total: int | None, block: float, as_json: bool
    ) -> None:
        self.sent = 0
        self._producer = producer
        self._total = total
        self._block = block
        self._as_json = as_json
        self._last_line = 0

    @contextmanager
    def reporting_progress(self) -> Iterator[None]:
        """Say in the error of whatever ends the run how much of it was done."""
        try:
            yield
        except (TaskTagsError, console.OutputFailed, KeyboardInterrupt) as error:
            of = "" if self._total is None else f" of {self._total}"
            until = f", up to line {self._last_line}" if self.sent else ""
            # An answer may be lost.
            known = "are known to have been" if isinstance(error, Unavailable) else "were"
            report = f"{self.sent}{of} batches {known} enqueued{until}"
            if isinstance(error, KeyboardInterrupt):
                console.fail(INTERRUPTED, f"interrupted: {report}")
            if isinstance(error, InboxFull):
                console.fail(FULL, f"the inbox is full: {report}")
            error.add_note(report)
            raise

    def send(self, batches: Iterable[Batch]) -> None:
        """Send batches. Raises `InboxFull`, and what `TagProducer.send` raises."""
        for piece in _pieces(console.progress(batches, self._total)):
            self._print_new_ids(piece)
            begin = time.monotonic()
            accepted = self._producer.send([batch.encoded for batch in piece], self._block)
            self._block -= time.monotonic() - begin
            if accepted:
                self.sent += accepted
                self._last_line = piece[accepted - 1].line
            if accepted < len(piece):
                raise InboxFull([])

    def submit(self, batches: Iterable[Batch]) -> Iterator[tuple[UUID, Future[ResultRecord]]]:
        """Submit batches; yield their ids and results in order.

        They are at most `_PIECE` ahead of the results, so that these fit in the inbox, and so many
        bytes that they fit in memory.
        """
        waiting: deque[tuple[Batch, UUID, Future[ResultRecord]]] = deque()
        size = 0
        for batch in console.progress(batches, self._total):
            self._print_new_ids([batch])
            message, begin = parse_message(batch.encoded), time.monotonic()
            waiting.append((batch, message.batch_id, self._producer.submit(message, self._block)))
            self._block -= time.monotonic() - begin
            self.sent += 1
            self._last_line = batch.line
            size += len(batch.encoded)
            while len(waiting) == _PIECE or size > _AHEAD_BYTES:
                first, batch_id, result = waiting.popleft()
                size -= len(first.encoded)
                yield batch_id, result
        yield from ((batch_id, result) for _, batch_id, result in waiting)

    def print_results(
        self, submitted: Iterable[tuple[UUID, Future[ResultRecord]]], timeout: float
    ) -> int:
        """Print results in order, each after so many seconds at most, and return the exit code."""
        code = 0
        for batch_id, result in submitted:
            try:
                record = result.result(timeout)
            except FutureTimeout:
                result.cancel()
                console.print_error(f"{batch_id}: {self._producer.timed_out(timeout)}")
                code = NO_RESULT
            else:
                _print_record(record, self._as_json)
                code = REFUSED if record.error is not None else code
        return code

    def _print_new_ids(self, piece: list[Batch]) -> None:
        for line, _, new_id in piece:
            if new_id is not None:
                said = json.dumps({"line": line, "batch_id": str(new_id)})
                console.show(f"line {line}: batch {new_id}", [said], self._as_json)


def _pieces(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Yield batches in pieces of a bounded number and size."""
    piece: list[Batch] = []
    size = 0
    for batch in batches:
        piece.append(batch)
        size += len(batch.encoded)
        if len(piece) == _PIECE or size > _PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
