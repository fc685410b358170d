"""Tables of tags cut nothing, however wide the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from producers.console import tag_table

TAG = {
    "task_name": "extract_data",
    "tag_type": "review_status",
    "tag": "レビュー済み[b]",
    "tag_metadata": {"reviewer": "ada"},
    "created_by": "developer",
    "created_at": "2026-11-22T03:20:54.123456Z",
}
LONG = TAG | dict.fromkeys(("task_name", "tag_type", "tag", "created_by"), "x[/]" * 30)


def shown(tags: list[dict[str, Any]], width: int, terminal: bool) -> list[str]:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, no_color=True, soft_wrap=True
    )
    console.print(tag_table(tags), highlight=False)
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
