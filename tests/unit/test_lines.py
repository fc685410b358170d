"""Lines end at 100 characters, also where ruff does not look; modules end at 450 lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.support.checkout import REPOSITORY, listed_files

MOST = 100
KINDS = {".css", ".html", ".js", ".lua", ".md", ".sh", ".toml", ".yaml", ".yml", ""}
GENERATED = {"docs/reference.md", "docs/bench.md"}


def long_lines(path: str, text: str) -> Iterator[str]:
    """Yield the lines that are too long, but for tables, URLs, and blocks of code in Markdown."""
    in_block = False
    for number, line in enumerate(text.splitlines(), 1):
        if path.endswith(".md") and line.lstrip().startswith("```"):
            in_block = not in_block
        is_whole = in_block or line.startswith("| ") or "://" in line or "data:" in line
        if len(line) > MOST and not is_whole:
            yield f"{path}:{number}: {line}"


def test_a_long_line_is_noticed() -> None:
    """In prose, and in code of any language; what can't be wrapped is left."""
    long = "x" * 101
    assert list(long_lines("a.md", f"{long}\n```\n{long}\n```\n| {long}\nhttps://{long}"))
    assert len(list(long_lines("a.js", f"{long}\n```\n{long}"))) == 2


def test_lines_end_at_100_characters() -> None:
    paths = [
        path for path in listed_files() if Path(path).suffix in KINDS and path not in GENERATED
    ]
    assert "worker/api/page/script.js" in paths
    found = [each for path in paths for each in long_lines(path, (REPOSITORY / path).read_text())]
    assert not found, "\n".join(found)


def test_modules_of_the_product_end_at_450_lines() -> None:
    paths = [path for path in listed_files() if path.startswith(("producers/", "worker/"))]
    modules = [path for path in paths if path.endswith(".py")]
    lines = {path: len((REPOSITORY / path).read_text().splitlines()) for path in modules}
    assert lines
    assert {path: number for path, number in lines.items() if number > 450} == {}
