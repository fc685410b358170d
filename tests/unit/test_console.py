"""Tables of tags cut nothing, however wide the terminal; a result is one line."""

from __future__ import annotations

import io
from datetime import datetime, timezone
from typing import Any
from uuid import UUID

import pytest
from rich.cells import cell_len
from rich.console import Console

from producers.console import result_line, tag_table, task_table
from producers.contract.results import ResultRecord, Tag, TaskExecution

TAG = {
    "task_name": "extract_data",
    "tag_type": "review_status",
    "tag": "レビュー済み[b]",
    "tag_metadata": {"reviewer": "ada"},
    "created_by": "developer",
    "created_at": "2026-11-22T03:20:54.123456Z",
}
LONG = TAG | dict.fromkeys(("task_name", "tag_type", "tag", "created_by"), "x[/]" * 30)


def shown(tags: list[Any], width: int, terminal: bool) -> list[str]:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, no_color=True, soft_wrap=True
    )
    table = tag_table(tags) if isinstance(tags[0], dict) else task_table(tags)
    console.print(table, highlight=False)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 250])
def test_a_terminal_shows_every_character_of_a_tag(width: int) -> None:
    """Time and type in one line, if they are of a usual length; long ones go on in the next."""
    _, line, *more = shown([TAG], width, True)
    assert line.split()[:2] == ["extract_data", "review_status"]
    assert line.split()[-2:] == ["developer", "2026-11-22T03:20:54Z"]
    assert "レビュー" in line
    text = "".join(shown([LONG], width, True)[1:])
    assert text.count("x") == 4 * 30
    assert "…" not in text
    assert all(cell_len(each) <= width for each in [line, *more])


def test_what_is_no_terminal_gets_a_line_for_each_tag() -> None:
    """As a program or a file wants it, whatever width is assumed."""
    _, first, second = shown([TAG, LONG], 80, False)
    assert first.split()[2:5] == ["レビュー済み[b]", '{"reviewer":', '"ada"}']
    assert second.count("x[/]" * 30) == 4


def line_of(**outcome: Any) -> str:
    """Return a result as a terminal shows it, without its batch id."""
    record = ResultRecord.model_validate(
        {"batch_id": UUID(int=7), "organization_id": UUID(int=8), **outcome}
    )
    file = io.StringIO()
    Console(file=file, no_color=True, soft_wrap=True).print(result_line(record), highlight=False)
    return file.getvalue().removeprefix(f"{record.batch_id}  ").rstrip("\n")


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        ({"status": "recorded"}, "recorded"),
        ({"status": "recorded", "cleared": 2}, "recorded (2 tags removed)"),
        ({"status": "recorded", "cleared": 1}, "recorded (1 tag removed)"),
        ({"status": "unchanged", "cleared": 0}, "unchanged (0 tags removed)"),
    ],
)
def test_a_state_says_how_many_tags_it_removed(outcome: dict[str, Any], line: str) -> None:
    """If it was to remove any."""
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert line_of(applied_at=now, task_execution=outcome) == line


def test_what_a_condition_found_is_escaped() -> None:
    """Others chose these texts: a terminal shows them, and obeys neither them nor their markup."""
    found = {
        "tag_type": "status",
        "tag": "[red]x\u202e\x9b2J",
        "created_by": "eve\x1b]0;owned\x07\r\n",
        "created_at": datetime(2026, 1, 1, tzinfo=timezone.utc),
    }
    detail = {"index": 0, "field": "conditions", "message": "such a tag is active"}
    error = {
        "code": "precondition_failed",
        "message": "no",
        "details": [{**detail, "found": [found]}],
    }
    assert line_of(error=error) == (
        "precondition_failed: no (condition 0: such a tag is active; there is "
        r"status [red]x\u202e\x9b2J of eve\x1b]0;owned\x07\r\n)"
    )


def task(*tags: dict[str, Any], name: str = "review") -> TaskExecution:
    found = [Tag(**TAG_DEFAULTS | tag) for tag in tags]
    moment = datetime(2026, 11, 22, 3, 20, 54, 123456, timezone.utc)
    execution = UUID(int=1)
    return TaskExecution("flow", execution, name, "running", None, None, found, moment, None)


TAG_DEFAULTS: dict[str, Any] = dict.fromkeys(Tag.__dataclass_fields__) | {"tag": "pending"}


def test_tasks_are_shown_with_all_characters() -> None:
    """Folded on a terminal that is too narrow; elsewhere, and where they fit, in one line each."""
    tasks = [
        task({"tag_type": "a"}),
        task({"tag_type": "x[/]" * 30}, {"tag_type": "\x1b"}, name="t"),
    ]
    for width, terminal in ((80, True), (300, True), (80, False)):
        _, *lines = shown(tasks, width, terminal)
        text = "".join("".join(lines).split())
        assert text.replace("\\x1b", "").count("x") == 30
        assert "…" not in text
        if terminal:
            assert all(cell_len(line) <= width for line in lines)
        if (width, terminal) != (80, True):
            assert len(lines) == 2
            assert "2026-11-22T03:20:54Z  a: pending" in lines[0]
