"""Write docs/page.png, the live page in the README: `python -m tests.support.screenshot`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
from playwright.sync_api import Browser, expect

from tests.support.browser import address, open_browser
from tests.support.script_stack import script_stack
from worker.auth import SCOPES, sign_token
from worker.local.stack import DEVELOPMENT_ORGANIZATION, signing_settings
from worker.settings import Settings

FILE: Final = Path(__file__).parents[2] / "docs" / "page.png"
EXECUTION: Final = UUID("01970000-0000-7000-8000-00000000e001")
TASKS: Final = ["extract_data", "transform", "review", "publish"]


class Actor:
    """Somebody who uses the endpoint in their own name."""

    def __init__(self, name: str, endpoint_url: str, key: Settings) -> None:
        self.token = sign_token(
            key,
            organization_id=DEVELOPMENT_ORGANIZATION,
            actor=name,
            scopes=SCOPES,
            lifetime=timedelta(hours=8),
        )
        headers = {"Authorization": f"Bearer {self.token}"}
        self._http = httpx.Client(base_url=endpoint_url, headers=headers, trust_env=False)

    def register(self) -> None:
        self._put(f"/flow-executions/{EXECUTION}", {"task_names": TASKS})

    def state(self, task: str, state: str) -> None:
        body = {"flow_execution_id": str(EXECUTION), "task_name": task, "state": state}
        self._put("/task-executions", body)

    def tags(self, *operations: dict[str, Any]) -> None:
        body = {"tags": [{"flow_execution_id": str(EXECUTION), **each} for each in operations]}
        self._http.patch("/task-tags", json=body).raise_for_status()

    def _put(self, path: str, body: dict[str, Any]) -> None:
        self._http.put(path, json=body).raise_for_status()


def _add(task: str, tag_type: str, tag: str, metadata: Any = None) -> dict[str, Any]:
    return {
        "operation": "add",
        "task_name": task,
        "tag_type": tag_type,
        "tag": tag,
        "tag_metadata": metadata,
    }


def _remove(task: str, tag_type: str, tag: str) -> dict[str, Any]:
    return {**_add(task, tag_type, tag), "operation": "remove"}


def _past(runner: Actor, ada: Actor, bot: Actor) -> None:
    """What had happened before the page was opened."""
    runner.register()
    for task in TASKS:
        runner.state(task, "queued")
    runner.state("extract_data", "running")
    runner.tags(_add("extract_data", "source", "scanner-3", {"pages": 4, "ocr": 0.97}))
    runner.state("extract_data", "completed")
    bot.tags(
        _add("extract_data", "quality", "quality_checked", {"score": 0.98}),
        _add("extract_data", "review_status", "pending"),
    )
    runner.state("transform", "running")
    ada.tags(
        _remove("extract_data", "review_status", "pending"),
        _add("extract_data", "review_status", "reviewed", {"reviewer": "ada"}),
    )


def _present(runner: Actor, grace: Actor, bot: Actor) -> None:
    """What happens while the page is open."""
    runner.state("transform", "completed")
    bot.tags(
        _add("transform", "quality", "schema_valid"),
        _add("transform", "quality", "quality_checked", {"rows": 18204, "rejected": 3}),
        _add("transform", "routing", "manual_review", {"reason": "3 rejected rows"}),
    )
    runner.state("review", "running")
    grace.tags(
        _add("review", "assignee", "grace"),
        _add("review", "priority", "high", {"due": "2026-11-24"}),
    )
    grace.tags(_add("review", "review_status", "approved", {"reviewer": "grace"}))


def take(browser: Browser, endpoint_url: str, key: Settings) -> bytes:
    """Fill an execution, open the page as ada, let her add a tag, and return the picture."""
    actors = [
        Actor(name, endpoint_url, key) for name in ("flow-runner", "ada", "grace", "quality-bot")
    ]
    runner, ada, grace, bot = actors
    _past(runner, ada, bot)
    context = browser.new_context(
        viewport={"width": 1200, "height": 800},
        device_scale_factor=1.5,
        color_scheme="light",
        reduced_motion="reduce",
        locale="en-GB",
    )
    page = context.new_page()
    page.goto(address(endpoint_url, EXECUTION, ada.token))
    expect(page.get_by_role("status", name="Connection")).to_have_text("Live")
    _present(runner, grace, bot)
    for label, value in (("Task", "publish"), ("Type", "routing"), ("Tag", "web")):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Add tag").click()
    expect(page.get_by_text("Added (")).to_be_visible()
    expect(page.get_by_role("list", name="Tags of publish")).to_contain_text("web")
    return page.screenshot()


def main() -> None:
    with script_stack(1) as (directory, stack), open_browser() as browser:
        FILE.write_bytes(take(browser, stack.endpoint_url, signing_settings(directory)))
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
