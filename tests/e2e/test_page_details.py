"""The live page in a real browser: small things that hurt those who look at it for long."""

from __future__ import annotations

import base64
import re
from uuid import UUID

import pytest
from playwright.sync_api import Locator, Page, expect

from producers.client import TagProducer
from producers.contract.messages import add
from tests.support.browser import (
    Open,
    add_by_hand,
    alerts,
    applied,
    connection,
    cut_off,
    remove_button,
    remove_by_hand,
    tags_of,
)
from tests.support.servers import Servers
from worker.auth import READ

CLOSED = {
    1000: "The endpoint ended the connection.",
    1011: "The endpoint met a fault of its own.",
    1012: "The endpoint is being restarted.",
    1013: "The endpoint has too much to do.",
    3999: "The endpoint ended the connection, with the code 3999.",
}


@pytest.mark.parametrize("code", CLOSED)
def test_a_connection_that_is_closed_says_why_in_words(
    execution: UUID, open_page: Open, token: str, code: int
) -> None:
    """Of a restart and of other codes; then the page connects again by itself."""
    page = open_page(execution, token)
    restore = cut_off(page, code)
    alerts(page, CLOSED[code])
    restore()
    expect(connection(page)).to_have_text("Live")


def test_a_time_of_another_day_has_its_date(execution: UUID, open_page: Open, token: str) -> None:
    """Also on a page that was open when the day ended."""
    page = open_page(execution, token, locale="en-GB")
    time = tags_of(page, "extract_data").get_by_role("time")
    expect(time).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
    page.evaluate(
        """() => {
            const now = Date.now, Real = Date;
            window.Date = class extends Real {
                constructor(...given) {
                    super(...(given.length ? given : [now() + 26 * 3600 * 1000]));
                }
            };
        }"""
    )
    expect(time).to_have_text(re.compile(r"^\d{1,2} \w{3,4} \d{4}, \d\d:\d\d$"))


def test_approved_and_rejected_look_different(
    producer: TagProducer, execution: UUID, open_page: Open, token: str
) -> None:
    """By their colours, and by a sign for who sees no colours; a word of no verdict has none."""
    for tag in ("approved", "rejected", "pending"):
        applied(producer, add(execution, "review", "review_status", tag))
    page = open_page(execution, token)
    looks = {}
    for tag in ("approved", "rejected", "pending"):
        chip = tags_of(page, "review").filter(has_text=tag).locator(".chip")
        looks[tag] = chip.evaluate(
            """chip => [
                getComputedStyle(chip).color,
                getComputedStyle(chip).backgroundColor,
                getComputedStyle(chip.querySelector('.chip-tag'), '::before').content,
            ]"""
        )
    colours, grounds, signs = zip(*looks.values(), strict=True)
    assert len(set(colours)) == len(set(grounds)) == len(set(signs)) == 3
    assert [sign.split()[0] for sign in signs] == ['"✓', '"✗', "none"]


def pixels(page: Page, place: Locator) -> list[int]:
    """Return the colours of a place's middle row."""
    found: list[int] = page.evaluate(
        """async picture => {
            const image = new Image();
            image.src = `data:image/png;base64,${picture}`;
            await image.decode();
            const canvas = new OffscreenCanvas(image.width, image.height);
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const row = context.getImageData(0, Math.floor(image.height / 2), image.width, 1);
            return [...new Uint32Array(row.data.buffer)];
        }""",
        base64.b64encode(place.screenshot()).decode(),
    )
    return found


def test_the_connections_state_can_be_seen_in_forced_colours(
    execution: UUID, open_page: Open, token: str
) -> None:
    """There is a dot, which is empty while there is no connection; words say the same."""
    page = open_page(execution, token, forced_colors="active", device_scale_factor=3)
    ground = pixels(page, page.locator(".connection"))[-1:]
    dot = pixels(page, page.locator(".dot"))
    assert dot[len(dot) // 2] not in ground
    cut_off(page)
    dot = pixels(page, page.locator(".dot"))
    assert dot[len(dot) // 2] in ground
    assert any(colour not in ground for colour in dot)


def test_paper_has_no_buttons(execution: UUID, open_page: Open, token: str) -> None:
    """And no fields to fill in; the tags are there."""
    page = open_page(execution, token)
    assert page.locator(":is(button, input):visible").count() > 5
    page.emulate_media(media="print")
    assert page.locator(":is(button, input):visible").count() == 0
    expect(tags_of(page, "extract_data")).to_be_visible()


def test_a_token_to_read_with_shows_nothing_that_changes_things(
    servers: Servers, organization: UUID, execution: UUID, open_page: Open, token: str
) -> None:
    """No form and no ×, also for the keyboard; a token that may write brings both."""
    page = open_page(execution, servers.token(organization, READ))
    expect(page.get_by_text("to read only")).to_be_visible()
    expect(tags_of(page, "extract_data")).to_be_visible()
    names = page.get_by_role("button").all_inner_texts()
    assert names == ["Open another", "Forget token"]
    assert page.get_by_role("textbox").count() + page.get_by_role("combobox").count() == 0

    page.get_by_role("button", name="Open another").click()
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Open", exact=True).click()
    expect(connection(page)).to_have_text("Live")
    add_by_hand(page, "review", "review_status", "reviewed")
    remove_by_hand(page, "review_status: reviewed from review")
    expect(tags_of(page, "review")).to_have_count(0)


def test_a_second_enter_removes_nothing(
    producer: TagProducer, execution: UUID, open_page: Open, token: str
) -> None:
    """Nor does a double click. After a removal the focus is on no button, yet near."""
    for number in range(3):
        applied(producer, add(execution, "review", "number", f"{number}"))
    page = open_page(execution, token)
    first = remove_button(page, "number: 0 from review")
    first.focus()
    for _ in range(4):
        page.keyboard.press("Enter")
    expect(first).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(first).to_be_focused()
    first.dblclick()
    expect(first).to_be_visible()

    remove_by_hand(page, "number: 1 from review")
    expect(tags_of(page, "review")).to_have_count(2)
    expect(tags_of(page, "review").filter(has_text="number: 2")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("Enter")
    add_by_hand(page, "review", "number", "last")
    expect(tags_of(page, "review")).to_have_text([re.compile(f"number: {n}") for n in "02l"])


@pytest.mark.parametrize("width", [360, 1280])
def test_the_notice_of_a_lost_connection_moves_nothing(
    execution: UUID, open_page: Open, token: str, width: int
) -> None:
    """Neither as it comes nor as it goes: the × stays where the pointer is."""
    page = open_page(execution, token, viewport={"width": width, "height": 740})
    button = remove_button(page, "source: scanner-3 from extract_data")
    places = [button.bounding_box()]
    restore = cut_off(page)
    alerts(page, CLOSED[1012])
    expect(page.get_by_role("button", name="Reconnect now")).to_be_visible()
    places.append(button.bounding_box())
    restore()
    expect(connection(page)).to_have_text("Live")
    places.append(button.bounding_box())
    assert places == places[:1] * 3


def test_a_token_that_ends_moves_nothing(execution: UUID, open_page: Open, token: str) -> None:
    """The form for another one comes when it is asked for."""
    page = open_page(execution, token)
    button = remove_button(page, "source: scanner-3 from extract_data")
    place = button.bounding_box()
    cut_off(page, 4401)
    alerts(page, "The token was refused")
    assert button.bounding_box() == place
    page.get_by_role("button", name="Give another token").click()
    expect(page.get_by_label("Token")).to_be_focused()
