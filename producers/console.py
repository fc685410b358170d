"""What both commands print: errors, JSON lines, and results, changes and tags for people.

Texts from outside are escaped: a terminal shows their control characters and does not obey them.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, Final, NoReturn, TypeVar, cast

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from producers.contract.errors import describe
from producers.contract.results import (
    Change,
    ChangeEvent,
    ResultRecord,
    StateChange,
    TaskExecution,
    UnknownChange,
)

Item = TypeVar("Item")

_NARROW: Final = (14, 18, 0, 0, 10, 20)
"""The widest columns of a table of tags on a narrow terminal: at 80, the tag has 10 at least."""
_WIDE_ENOUGH: Final = 76
"""A terminal on which ids and times of a table of tasks are not wrapped."""
OUTPUT_FAILED: Final = 6
"""The exit code of both commands when standard output can't be written."""
_ESCAPED: Final = "task-tags-escaped"

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"task-tags {version('task-tags')}")
        raise typer.Exit


def version_option(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Make a command line understand --version."""


# --- Standard streams ----------------------------------------------------------------------------


class OutputFailed(Exception):
    """Standard output is closed or full, or nobody reads it any more."""


class _Stream(io.TextIOWrapper):
    """Standard output or error, which writes each line at once.

    What its encoding does not have is written as `\\u` escapes. Standard output raises
    `OutputFailed` if it can't be written; standard error does not, because it may be the
    log of a process, and there may be space for it again later.
    """

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return 0

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self is sys.stdout:
            # What is left in the buffer is written when the process ends: it must go somewhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise OutputFailed(f"standard output can't be written: {error.strerror}") from None


def open_streams() -> None:
    """Prepare standard output and error; both commands do it first."""
    codecs.register_error(_ESCAPED, _escape)
    sys.stdout, sys.stderr = _stream(sys.stdout), _stream(sys.stderr)


def _stream(stream: Any) -> _Stream:
    if stream is None:  # closed: as a descriptor that can't be written
        closed = io.FileIO(os.open(os.devnull, os.O_RDONLY), "w")
        return _Stream(io.BufferedWriter(closed), "utf-8", line_buffering=True)
    encoding = stream.encoding
    return _Stream(stream.detach(), encoding, errors=_ESCAPED, line_buffering=True)


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


# --- What is printed -----------------------------------------------------------------------------


def fail(code: int, error: object) -> NoReturn:
    """Print an error as one line, and exit with this code."""
    print_error(error)
    sys.exit(code)


def print_error(error: object) -> None:
    text = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
    line = " ".join(text.split())
    err.print(f"[bold red]error:[/] {escape_terminal(line)}")


def show(text: RenderableType, json_lines: Iterable[str], as_json: bool) -> None:
    """Print JSON lines as they are; or else the text, whose strings are Rich markup."""
    if as_json:
        for line in json_lines:
            write(f"{line}\n")
    else:
        out.print(text)


def write(text: str) -> None:
    """Print a text for programs: as it is, in UTF-8."""
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8", errors=_ESCAPED)
    sys.stdout.write(text)
    sys.stdout.flush()


def progress(items: Iterable[Item], total: int | None) -> Iterable[Item]:
    """Show a progress bar on a terminal, and nothing elsewhere."""
    hidden = not err.is_terminal
    return track(items, "enqueuing", total, console=err, transient=True, disable=hidden)


def within(least: float, most: float) -> Callable[[float | None], float | None]:
    """Return the callback of an option that takes numbers in a range."""

    def check(value: float | None) -> float | None:
        if value is not None and not least <= value <= most:  # NaN is not, either
            raise typer.BadParameter(f"{value:g} is not in the range {least:g} to {most:,.10g}")
        return value

    return check


def escape_terminal(text: str) -> str:
    """Escape control characters and Rich markup, so that a terminal only shows the text."""
    return escape(_printable(text))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def result_line(record: ResultRecord) -> str:
    """Return a result as one line of Rich markup."""
    if record.error is not None:
        details = "; ".join(describe(detail) for detail in record.error.details[:3])
        more = f" ({details})" if details else ""
        said = f"[red]{record.error.code}[/]: {record.error.message}"
        return f"{record.batch_id}  {said}{escape_terminal(more)}"
    cleared = record.task_execution and record.task_execution.cleared
    removed = "" if cleared is None else f" ({cleared} tag{'s' * (cleared != 1)} removed)"
    return f"{record.batch_id}  [green]{', '.join(record.statuses)}[/]{removed}"


def change_lines(event: ChangeEvent) -> str:
    """Return a change event as lines of Rich markup, one for each change."""
    where, who = f"{event.flow_execution_id} #{event.revision}", escape_terminal(event.changed_by)
    return "\n".join(f"{where}  {_changed(change)}  by {who}" for change in event.changes)


def _changed(change: Change | StateChange | UnknownChange) -> str:
    if isinstance(change, UnknownChange):
        return f"[yellow]?[/] {escape_terminal(change.change)}"
    if isinstance(change, StateChange):
        return f"[blue]=[/] {escape_terminal(f'{change.task.task_name}  {change.task.state}')}"
    sign = "[green]+[/]" if change.change == "added" else "[red]-[/]"
    tag = change.tag
    return f"{sign} {escape_terminal(f'{tag.task_name}  {tag.tag_type}: {tag.tag}')}"


def tag_table(tags: Sequence[dict[str, Any]]) -> RenderableType:
    """Return active tags, as the endpoint serves them, as a table that cuts nothing.

    On a terminal that is too narrow the metadata is below the tag, and long texts go on in the next
    line. Elsewhere each tag is one line.
    """
    return _TagTable(tags)


@dataclass(frozen=True)
class _TagTable:
    tags: Sequence[dict[str, Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        rows = [_cells(tag) for tag in self.tags]
        headers = ["task", "type", "tag", "metadata", "by", "at"]
        widths = [max(map(cell_len, column)) for column in zip(headers, *rows, strict=True)]
        natural = sum(widths) + 2 * (len(widths) - 1)
        if console.is_terminal and natural > options.max_width:
            rows = [[*row[:2], "\n".join(filter(None, row[2:4])), *row[4:]] for row in rows]
            headers.remove("metadata")
            task, type, _, _, by, at = map(min, widths, _NARROW)
            rest = options.max_width - task - type - by - at - 2 * 4
            widths = [task, type, max(rest, 4), by, at]
            natural = sum(widths) + 2 * 4
        table = Table(box=None, pad_edge=False, width=natural)
        for header, width in zip(headers, widths, strict=True):
            table.add_column(header, width=width, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        yield table


def task_table(tasks: Sequence[TaskExecution]) -> RenderableType:
    """Return the tasks of a work list as a table that cuts nothing; elsewhere each is one line.

    On a terminal that is too narrow, the flow and the time are below the execution, the state is
    below the task, and each tag has its line.
    """
    return _TaskTable(tasks)


@dataclass(frozen=True)
class _TaskTable:
    tasks: Sequence[TaskExecution]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        headers = ["flow", "execution", "task", "state", "waiting since", "tags"]
        cells = [_task_cells(task) for task in self.tasks]
        rows = [[*rest, tags.replace("\n", ", ")] for *rest, tags in cells]
        widths = [max(map(cell_len, column)) for column in zip(headers, *rows, strict=True)]
        natural = sum(widths) + 2 * (len(widths) - 1)
        fixed: Sequence[int | None] = widths
        if console.is_terminal and natural > options.max_width:
            natural = options.max_width
            headers = ["execution", "task", "tags"]
            rows = [
                [
                    "\n".join(filter(None, (id, flow, since and f"since {since}"))),
                    f"{task}\n{state}".strip(),
                    tags,
                ]
                for flow, id, task, state, since, tags in cells
            ]
            fixed = (36, None, None) if natural >= _WIDE_ENOUGH else (None,) * 3
        table = Table(box=None, pad_edge=False, width=natural)
        for header, width in zip(headers, fixed, strict=True):
            table.add_column(header, width=width, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        yield table


def _task_cells(task: TaskExecution) -> list[str]:
    since = "" if task.waiting_since is None else f"{task.waiting_since:%Y-%m-%dT%H:%M:%SZ}"
    tags = [_printable(f"{tag.tag_type}: {tag.tag}") for tag in task.tags]
    more = [] if task.tags_next is None else ["…"]
    texts = (task.flow_id or "", str(task.flow_execution_id), task.task_name, task.state or "")
    return [*map(_printable, texts), since, "\n".join(tags + more)]


def _cells(tag: dict[str, Any]) -> list[str]:
    metadata = tag["tag_metadata"]
    text = "" if metadata is None else json.dumps(metadata, ensure_ascii=False)
    cells = [tag["task_name"], tag["tag_type"], tag["tag"], text, tag["created_by"]]
    return [*map(_printable, cells), tag["created_at"][:19] + "Z"]
