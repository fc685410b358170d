"""A headless Chromium for the tests of the live page, and what a person sees of that page.

It is the Chromium of the system, driven by Playwright.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from uuid import UUID

import pytest
from playwright.sync_api import Browser, Locator, Page, WebSocketRoute, expect, sync_playwright

from producers.client import TagProducer
from producers.contract.messages import TagBatch, TagOperation

Open = Callable[..., Page]
"""Opens the page of an execution with a token; see tests/e2e/conftest.py."""

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS: Final = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Run the browser until the block ends. Where there is none, the test is skipped."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(
            f"no {', '.join(NAMES)} in PATH: the live page is not tested without one "
            "(on Debian: apt-get install chromium)"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def address(endpoint_url: str, execution: UUID, token: str) -> str:
    """Return the address of the live page of an execution, as `up` prints it."""
    return f"{endpoint_url}/#execution={execution}&token={token}"


def applied(producer: TagProducer, *operations: TagOperation) -> None:
    producer.apply(TagBatch(tags=list(operations)))


# --- What a person sees of the page ---------------------------------------------------------------


def connection(page: Page) -> Locator:
    return page.get_by_role("status", name="Connection")


def tags_of(page: Page, task: str) -> Locator:
    return page.get_by_role("list", name=f"Tags of {task}", exact=True).get_by_role("listitem")


def batches(page: Page) -> Locator:
    return page.get_by_role("region", name="Batches").locator("ol > li")


def remove_button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=f"Remove {name}", exact=True)


def remove_by_hand(page: Page, name: str) -> None:
    remove_button(page, name).click()
    page.get_by_role("group", name=f"Remove {name}?").get_by_role("button", name="Remove").click()


def add_by_hand(page: Page, task: str, tag_type: str, tag: str, metadata: str = "") -> None:
    page.get_by_label("Task", exact=True).fill(task)
    page.get_by_label("Type", exact=True).fill(tag_type)
    page.get_by_label("Tag", exact=True).fill(tag)
    page.get_by_role("textbox", name="Metadata").fill(metadata)
    page.get_by_role("button", name="Add tag").click()


def shown_tags(page: Page) -> list[tuple[str, ...]]:
    """Return task, type, tag, metadata and actor of each tag on the page."""
    rows = page.locator("li.tag").evaluate_all(
        """rows => rows.map(row => [
            row.closest('.task').querySelector('.task-name'),
            ...['.chip-type', '.chip-tag', '.metadata', '.by-who'].map(
                part => row.querySelector(part)),
        ].map(part => part.textContent))"""
    )
    return sorted(tuple(row) for row in rows)


def shown_revisions(page: Page) -> list[int]:
    found: list[int] = page.locator("[data-revision]").evaluate_all(
        "rows => rows.map(row => Number(row.dataset.revision))"
    )
    return found


def alerts(page: Page, words: str) -> None:
    expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()


def cut_off(page: Page, code: int = 1012) -> Callable[[], None]:
    """End the connection, and each new one, with a code, until what is returned is called."""
    lost = [True]

    def answer(socket: WebSocketRoute) -> None:
        if lost:
            socket.on_message(lambda _: socket.close(code=code))
        else:
            socket.connect_to_server()

    page.route_web_socket("**/task-tags/changes*", answer)
    page.evaluate("dispatchEvent(new Event('offline'))")
    expect(connection(page)).to_have_text("Not connected")
    return lost.clear
