"""The table of planted mistakes fits the code, also where nobody runs `make mutants`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: f"{each.file}-{each.wrong[:30]}")
def test_a_planted_mistake_is_one_and_has_a_test(mutant: Mutant) -> None:
    """Its text stands once in the file, what is planted can be read, and its test exists."""
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.right) == 1
    assert mutant.right != mutant.wrong
    if mutant.file.endswith(".py"):
        compile(source.replace(mutant.right, mutant.wrong), mutant.file, "exec")
    file, _, name = mutant.test.partition("::")
    assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_no_mistake_is_planted_twice() -> None:
    """Each is another change of the code."""
    assert len({mutant[:3] for mutant in MUTANTS}) == len(MUTANTS)
