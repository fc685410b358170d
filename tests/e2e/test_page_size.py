"""The live page in a real browser: with thousands of tags, and on a phone."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from playwright.sync_api import Page, expect

from producers.client import TagProducer
from producers.contract.messages import add
from tests.support.browser import Open, applied, batches, remove_button, tags_of

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TASKS, TAGS = 50, 100


@pytest.fixture
def crowded(producer: TagProducer) -> UUID:
    """An execution with 5,000 tags."""
    execution = uuid4()
    producer.register(execution)
    for task in range(TASKS):
        applied(
            producer,
            *(add(execution, f"task-{task:02}", "number", f"{each}") for each in range(TAGS)),
        )
    return execution


def elements(page: Page) -> int:
    return page.locator("*").count()


def tab_stops(page: Page) -> int:
    found: int = page.evaluate(
        """() => [...document.querySelectorAll('*')].filter(
            node => node.tabIndex >= 0 && node.checkVisibility()).length"""
    )
    return found


def test_thousands_of_tags_make_a_page_that_stays_light(
    producer: TagProducer, crowded: UUID, open_page: Open, token: str
) -> None:
    """Earlier tags and folded lines are built when they are asked for, and then they are there."""
    page = open_page(crowded, token)
    expect(page.get_by_text("5,000 tags")).to_be_visible()
    assert elements(page) < 12_000
    assert tab_stops(page) < 150

    shown = tags_of(page, "task-07")
    expect(shown.last).to_contain_text("number: 99")
    before = elements(page)
    task = page.locator(".task").filter(has=page.get_by_role("heading", name="task-07"))
    task.get_by_role("button", name="earlier tags").click()
    expect(shown).to_have_count(TAGS)
    expect(shown.first).to_be_focused()
    assert shown.locator(".chip-tag").all_inner_texts() == [f"{each}" for each in range(TAGS)]
    assert elements(page) > before + 900
    assert tab_stops(page) < 150

    # What comes later is shown, also where earlier ones are folded away.
    applied(producer, add(crowded, "task-07", "number", "new"))
    expect(shown).to_have_count(TAGS + 1)
    applied(producer, add(crowded, "task-08", "number", "new"))
    expect(tags_of(page, "task-08").last).to_contain_text("number: new")

    batch = batches(page).filter(has_text="100 added").first
    assert batch.get_by_role("listitem").count() < 10
    batch.get_by_text("and 96 more").click()
    expect(batch.get_by_role("listitem").filter(has_text="number: 99").last).to_be_visible()


def test_the_arrow_keys_lead_from_tag_to_tag(
    producer: TagProducer, execution: UUID, open_page: Open, token: str
) -> None:
    """All together they are one stop of the tab key, which is where the arrow keys have led to."""
    metadata = {"words": "x" * 200}
    applied(
        producer,
        add(execution, "review", "number", "1", metadata),
        add(execution, "review", "number", "2"),
    )
    page = open_page(execution, token)
    first = remove_button(page, "source: scanner-3 from extract_data")
    second = remove_button(page, "number: 1 with metadata from review")
    last = remove_button(page, "number: 2 from review")
    stops = tab_stops(page)
    first.focus()
    for key, place in (
        ("ArrowDown", page.locator(".metadata summary")),
        ("ArrowDown", second),
        ("ArrowDown", last),
        ("ArrowDown", last),
        ("ArrowUp", second),
        ("Home", first),
        ("End", last),
    ):
        page.keyboard.press(key)
        expect(place).to_be_focused()
    assert tab_stops(page) == stops
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    expect(last).to_be_focused()


def test_on_a_phone_the_tasks_come_first_and_no_field_zooms_the_page(
    execution: UUID, open_page: Open, token: str
) -> None:
    """A phone zooms in on a field with letters below 16 px; the form is one touch away."""
    page = open_page(execution, token, **PHONE)
    place = page.locator(".task").first.bounding_box()
    assert place is not None
    assert place["y"] < 420

    page.get_by_text("Add a tag").tap()
    expect(page.get_by_label("Task", exact=True)).to_be_visible()
    page.get_by_role("button", name="Open another").tap()
    sizes = page.locator("input:visible").evaluate_all(
        "fields => fields.map(field => parseFloat(getComputedStyle(field).fontSize))"
    )
    assert len(sizes) == 6
    assert min(sizes) >= 16


def test_a_task_with_more_tags_than_an_answer_shows_is_read_whole(
    producer: TagProducer, execution: UUID, open_page: Open, token: str
) -> None:
    """Its other tags are read page by page, and so are tasks behind the first page."""
    for start in (0, 100, 200):
        numbers = range(start, start + 100)
        applied(producer, *(add(execution, "review", "number", f"{n}") for n in numbers))
    page = open_page(execution, token)
    expect(page.get_by_text("301 tags")).to_be_visible()
    applied(producer, add(execution, "review", "number", "new"))
    expect(page.get_by_text("302 tags")).to_be_visible()
    expect(tags_of(page, "review").last).to_contain_text("number: new")

    many = uuid4()
    producer.register(many, [f"task-{number:04}" for number in range(1_002)])
    page = open_page(many, token)
    expect(page.get_by_text("1,002 tasks")).to_be_visible()
