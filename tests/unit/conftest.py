"""What holds for all unit tests: they start no server, and they are fast."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def servers() -> None:
    """Stand in for the stack of the other tests, and for every fixture that is made of it."""
    raise AssertionError("a unit test uses no server: put this one into tests/integration")


@pytest.fixture(autouse=True, scope="package")
def no_garbage_collection() -> Iterator[None]:
    """There is little garbage, and looking for it in test_inbox_model.py's states takes seconds."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
