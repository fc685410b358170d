"""What both commands print: errors, JSON lines, and results, changes and tags for people.

Texts from outside are escaped: a terminal shows their control characters and does not obey them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from producers.contract.errors import describe
from producers.contract.results import Change, ChangeEvent, ResultRecord, StateChange, UnknownChange

Item = TypeVar("Item")

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
    return escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


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


def tag_table(tags: Sequence[dict[str, Any]]) -> Table:
    """Return active tags, as the endpoint serves them, as a table."""
    table = Table("task", "type", "tag", "metadata", "by", "at", box=None, pad_edge=False)
    for tag in tags:
        metadata = tag["tag_metadata"]
        text = "" if metadata is None else json.dumps(metadata, ensure_ascii=False)
        cells = [tag["task_name"], tag["tag_type"], tag["tag"], text, tag["created_by"]]
        table.add_row(*[escape_terminal(cell) for cell in cells], tag["created_at"][:19] + "Z")
    return table
