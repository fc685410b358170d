"""Every page and rule that code or documentation cites is in the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.checkout import REPOSITORY, listed_files

CITED = re.compile(r"(?<![\w/.])(docs/[\w/-]+\.md|[\w/-]+\.md(?=#))(?:#([\w-]+))?")
LINKED = re.compile(r"\]\((?!https?:)([\w./-]+)?(?:#([\w-]+))?\)")


def files(*endings: str) -> Iterator[Path]:
    """Yield the files of the repository that have one of these endings."""
    for name in listed_files():
        if name.endswith(endings):
            yield REPOSITORY / name


def anchors(page: Path) -> set[str]:
    """Return what a link may name on a Markdown page: headings as slugs, and explicit ids."""
    text = page.read_text()
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", each.lower()).strip().replace(" ", "-") for each in headings}
    return slugs | set(re.findall(r'<a id="([\w-]+)">', text))


def test_what_code_cites_is_there() -> None:
    """As docs/concepts/contract.md#rule-3 is, in comments and docstrings."""
    missing = []
    for file in files(".py", ".lua", ".yaml", ".yml"):
        for name, anchor in CITED.findall(file.read_text()):
            page = REPOSITORY / name
            if not page.exists() or (anchor and anchor not in anchors(page)):
                missing.append(f"{file.relative_to(REPOSITORY)}: {name}#{anchor}")
    assert not missing


def test_links_between_pages_lead_somewhere() -> None:
    """To a file of the repository, and to a heading of it."""
    missing = []
    for page in files(".md"):
        for name, anchor in LINKED.findall(page.read_text()):
            target = page.parent / name if name else page
            wrong_anchor = anchor and target.suffix == ".md" and anchor not in anchors(target)
            if not target.exists() or wrong_anchor:
                missing.append(f"{page.relative_to(REPOSITORY)}: {name}#{anchor}")
    assert not missing


def test_no_comment_cites_what_is_elsewhere() -> None:
    """A rule is cited by its page, not by a section of a document that nobody has."""
    for file in files(".py", ".lua"):
        if file.name != Path(__file__).name:
            assert not re.search(r"\(design|design, section|\(section \d", file.read_text()), file
