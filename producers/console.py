"""What both commands print: errors, JSON lines, and results, changes and tags for people.

Texts from outside are escaped: a terminal shows their control characters and does not obey them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from producers.contract.errors import describe
from producers.contract.results import Change, ChangeEvent, ResultRecord, StateChange, UnknownChange

Item = TypeVar("Item")

_NARROW: Final = (14, 18, 0, 0, 10, 20)
"""The widest columns of a table of tags on a narrow terminal: at 80, the tag has 10 at least."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


def fail(code: int, error: object) -> NoReturn:
    """Print an error as one line, and exit with this code."""
    print_error(error)
    sys.exit(code)


def print_error(error: object) -> None:
    line = " ".join(str(error).split()) or type(error).__name__
    err.print(f"[bold red]error:[/] {escape_terminal(line)}")


def show(text: RenderableType, json_lines: Iterable[str], as_json: bool) -> None:
    """Print JSON lines as they are; or else the text, whose strings are Rich markup."""
    if as_json:
        for line in json_lines:
            typer.echo(line)
    else:
        out.print(text)


def progress(items: Sequence[Item]) -> Iterable[Item]:
    """Show a progress bar on a terminal, and nothing elsewhere."""
    return track(items, "enqueuing", console=err, transient=True, disable=not err.is_terminal)


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
        return f"{record.batch_id}  {said}{escape(more)}"
    return f"{record.batch_id}  [green]{', '.join(record.statuses)}[/]"


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


def _cells(tag: dict[str, Any]) -> list[str]:
    metadata = tag["tag_metadata"]
    text = "" if metadata is None else json.dumps(metadata, ensure_ascii=False)
    cells = [tag["task_name"], tag["tag_type"], tag["tag"], text, tag["created_by"]]
    return [*map(_printable, cells), tag["created_at"][:19] + "Z"]
