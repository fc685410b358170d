"""A browser for the tests of the live page, and pages in it that belong to nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.sync_api import Browser, Page, expect

from producers.client import TagProducer
from producers.contract.messages import add
from tests.support.browser import Open, address, applied, connection, open_browser
from tests.support.servers import Servers


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a whole file; each page of a test has a separate context, and so a token."""
    if os.environ.get("TASK_TAGS_NO_BROWSER") == "1":
        pytest.skip("TASK_TAGS_NO_BROWSER=1: the live page is not tested")
    expect.set_options(timeout=15_000)
    with open_browser() as browser:
        yield browser


@pytest.fixture
def complaints() -> list[str]:
    """Messages in the consoles of browsers: script errors, violations of the security policy."""
    return []


@pytest.fixture
def open_page(browser: Browser, servers: Servers, complaints: list[str]) -> Iterator[Open]:
    """Open the live page of an execution in a new context, and wait until it is live."""
    contexts = []

    def open_page(execution: UUID, token: str, *, live: bool = True, **options: Any) -> Page:
        context = browser.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: complaints.append(said.text) if said.type == "error" else None,
        )
        page.goto(address(servers.stack.endpoint_url, execution, token))
        if live:
            expect(connection(page)).to_have_text("Live")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def execution(producer: TagProducer) -> UUID:
    """One that knows two tasks and allows no others."""
    execution = uuid4()
    producer.register(execution, ["extract_data", "review"])
    applied(producer, add(execution, "extract_data", "source", "scanner-3"))
    return execution
