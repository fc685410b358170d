"""The live page in a real browser: a change on one page appears on all, also after faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID, uuid4

import httpx
from playwright.sync_api import Locator, Page, Route, expect

from producers.client import TagProducer
from producers.contract.messages import add, remove
from tests.support.browser import (
    Open,
    add_by_hand,
    alerts,
    applied,
    batches,
    connection,
    remove_button,
    remove_by_hand,
    shown_revisions,
    shown_tags,
    tags_of,
)
from tests.support.servers import Servers
from tests.support.waiting import eventually
from worker.auth import SCOPES, sign_token


def stored_tags(http: httpx.Client, execution: UUID) -> list[tuple[str, ...]]:
    """Return what `shown_tags` does, of what the endpoint gives; no tag of it has metadata."""
    tags = http.get("/task-tags", params={"flow_execution_id": str(execution)}).json()
    return sorted(
        (tag["task_name"], tag["tag_type"], tag["tag"], "", tag["created_by"]) for tag in tags
    )


@contextmanager
def endpoint_stopped(servers: Servers) -> Iterator[None]:
    """Stop the endpoint's process for the length of the block; then start it on the same port."""
    supervisor = servers.stack.supervisor
    child, process = next(each for each in supervisor.running if each[0].name == "endpoint")
    process.terminate()
    process.wait(30)
    try:
        yield
    finally:
        supervisor.restart_ended(lambda _: None)
        eventually(child.ready)


def test_what_one_page_changes_the_other_shows_in_place(
    servers: Servers,
    http: httpx.Client,
    organization: UUID,
    execution: UUID,
    open_page: Open,
    complaints: list[str],
) -> None:
    """With its actor, and the focus stays; the sender sees the status and how long it took."""
    adas = open_page(execution, servers.token(organization, sub="ada"))
    graces = open_page(execution, servers.token(organization, sub="grace"))
    old = remove_button(graces, "source: scanner-3 from extract_data")
    old.focus()

    add_by_hand(adas, "review", "review_status", "reviewed", '{"reviewer": "ada"}')
    expect(tags_of(graces, "review")).to_contain_text("review_status: reviewed")
    expect(tags_of(graces, "review")).to_contain_text('{"reviewer":"ada"} ada')
    expect(old).to_be_focused()
    expect(batches(graces).first).to_contain_text(
        re.compile(r"#2 ada.*1 added.*seen after \d", re.DOTALL)
    )
    sent = batches(adas).first
    expect(sent).to_contain_text(
        re.compile(r"#2 ada.*review.*added.*answered in \d+ ms", re.DOTALL)
    )

    add_by_hand(adas, "review", "review_status", "reviewed")
    expect(tags_of(graces, "review")).to_have_count(2)
    add_by_hand(adas, "review", "review_status", "reviewed")
    expect(batches(adas).first).to_contain_text("already exists")

    # Of two tags of one name, exactly the one without metadata goes.
    remove_by_hand(graces, "review_status: reviewed from review")
    expect(tags_of(adas, "review")).to_have_count(1)
    expect(tags_of(adas, "review")).to_contain_text('{"reviewer":"ada"}')
    expect(batches(adas).first).to_contain_text(re.compile("#4 grace.*1 removed", re.DOTALL))
    expect(batches(graces).first).to_contain_text(
        re.compile(r"#4 grace.*removed.*answered in", re.DOTALL)
    )

    state = {"flow_execution_id": str(execution), "task_name": "review", "state": "running"}
    http.put("/task-executions", json=state).raise_for_status()
    for page in (adas, graces):
        review = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="review"))
        expect(review).to_contain_text("running by ada")
        expect(batches(page).first).to_contain_text(
            re.compile("#5 ada.*review.*running", re.DOTALL)
        )
    assert complaints == []


def test_the_first_decision_counts_and_the_second_sees_who_made_it(
    servers: Servers,
    producer: TagProducer,
    organization: UUID,
    execution: UUID,
    open_page: Open,
) -> None:
    """Both have the question open; the decision of the first is one batch with its condition."""
    applied(producer, add(execution, "review", "review_status", "pending"))
    pages = [open_page(execution, servers.token(organization, sub=name)) for name in ("ada", "bob")]
    for page in pages:
        name = "Decide on, or remove, review_status: pending from review"
        page.get_by_role("button", name=name).click()
    ada, bob = pages
    held: list[Route] = []
    bob.route(
        "**/task-tags",
        lambda route: held.append(route) if route.request.method == "PATCH" else route.continue_(),
    )
    bob.get_by_role("button", name="Reject").click()
    ada.get_by_role("button", name="Approve").click()
    for page in pages:
        expect(tags_of(page, "review")).to_contain_text("review_status: approved")
        expect(tags_of(page, "review")).to_have_count(1)
    expect(batches(ada).first).to_contain_text("replaced")
    (route,) = held
    asked = route.request.post_data_json
    assert asked is not None
    assert asked["conditions"] == [
        {
            "flow_execution_id": str(execution),
            "task_name": "review",
            "tag_type": "review_status",
            "tag": "pending",
            "exists": True,
        }
    ]
    route.continue_()
    expect(bob.get_by_text(re.compile("Decided already.*approved.*by ada"))).to_be_visible()


def test_a_decision_is_offered_only_where_it_removes_nothing_else(
    producer: TagProducer, execution: UUID, open_page: Open, token: str
) -> None:
    """A decision leaves one tag of the type, so the pending one must be the only one of it."""
    other = (execution, "review", "kind", "invoice")
    applied(producer, add(execution, "review", "kind", "pending"), add(*other))
    page = open_page(execution, token)
    question = page.get_by_role("group", name="Remove kind: pending from review?")
    remove_button(page, "kind: pending from review").click()
    expect(question.get_by_role("button")).to_have_text(["Remove", "Keep"])
    applied(producer, remove(*other))
    expect(tags_of(page, "review")).to_have_count(1)
    question.get_by_role("button", name="Keep").click()
    page.get_by_role("button", name="Decide on, or remove, kind: pending from review").click()

    # Also if the other one comes while the question is open.
    applied(producer, add(*other))
    expect(tags_of(page, "review")).to_have_count(2)
    question.get_by_role("button", name="Reject").click()
    alerts(page, "there are other tags of the type “\u2068kind\u2069” now")
    question.get_by_role("button", name="Keep").click()
    expect(remove_button(page, "kind: pending from review")).to_be_visible()
    expect(tags_of(page, "review")).to_have_count(2)


def test_an_error_that_comes_late_is_shown(execution: UUID, open_page: Open, token: str) -> None:
    """Of a batch that was accepted without a result: the stored error ends the wait for it."""
    page = open_page(execution, token)
    page.route(
        "**/task-tags",
        lambda route: route.continue_(headers={**route.request.headers, "prefer": "respond-async"}),
    )
    add_by_hand(page, "no such task", "kind", "invoice")
    row = batches(page).first
    expect(row).to_contain_text("accepted, waiting")
    words = "not found.*answered in .*there is no task “.*no such task.*” here.*extract_data"
    expect(row).to_contain_text(re.compile(words, re.DOTALL))
    expect(row).not_to_contain_text("waiting")


NOTE_WHAT_IS_SAID = """() => {
    const words = document.getElementById('notice-words');
    window.said = '';
    new MutationObserver(() => said += `${words.textContent} | `).observe(words, {childList: true});
}"""


def test_pages_catch_up_by_themselves_after_the_endpoint_was_away(
    servers: Servers,
    producer: TagProducer,
    http: httpx.Client,
    execution: UUID,
    open_page: Open,
    token: str,
) -> None:
    """They say that they are not connected; then they show what is stored, each revision once."""
    pages = [open_page(execution, token) for _ in range(2)]
    add_by_hand(pages[0], "review", "review_status", "pending")
    expect(tags_of(pages[1], "review")).to_have_count(1)
    pages[0].evaluate(NOTE_WHAT_IS_SAID)
    with endpoint_stopped(servers):
        for page in pages:
            expect(connection(page)).to_have_text("Not connected")
            expect(page.get_by_role("button", name="Reconnect now")).to_be_visible()
            expect(page.get_by_role("alert")).to_contain_text("What you see is as of revision 2.")
        add_by_hand(pages[0], "review", "review_status", "lost?")
        expect(pages[0].get_by_role("alert").filter(has_text="No answer")).to_be_visible()
        for number in range(20):
            applied(producer, add(execution, "review", "number", f"{number}"))
        applied(
            producer,
            remove(execution, "review", "review_status", "pending"),
            remove(execution, "review", "number", "7"),
        )
    for page in pages:
        expect(connection(page)).to_have_text("Live")
        expect(page.get_by_text("revision 23", exact=False)).to_be_visible()
        assert shown_tags(page) == stored_tags(http, execution)
        assert shown_revisions(page) == list(range(23, 0, -1))
    assert "The endpoint is being restarted. " in pages[0].evaluate("said")
    pages[0].get_by_role("button", name="Send again").click()
    for page in pages:
        expect(tags_of(page, "review").filter(has_text="lost?")).to_be_visible()
        assert shown_tags(page) == stored_tags(http, execution)


HOSTILE = """<img src=x onerror="window.ran = 1"><script>window.ran = 1</script>"""


def test_html_in_tags_is_shown_as_text(
    producer: TagProducer, open_page: Open, token: str, complaints: list[str]
) -> None:
    """In names of tasks, types, tags and in metadata, read, received or typed: nothing runs."""
    execution = uuid4()
    producer.register(execution)
    hostile = add(execution, HOSTILE, HOSTILE[:99], HOSTILE, {HOSTILE: HOSTILE})
    applied(producer, hostile)
    page = open_page(execution, token)
    applied(producer, add(execution, HOSTILE, "received", HOSTILE, HOSTILE))
    add_by_hand(page, HOSTILE, "typed", HOSTILE, '"<b>bold</b>"')
    expect(tags_of(page, HOSTILE)).to_have_count(3)
    for row in tags_of(page, HOSTILE).all():
        expect(row).to_contain_text(HOSTILE)
    expect(tags_of(page, HOSTILE).last).to_contain_text('"<b>bold</b>"')
    expect(batches(page).first).to_contain_text(HOSTILE)
    assert page.locator(":is(main, #announcer) :is(img, script, b)").count() == 0
    assert page.evaluate("window.ran") is None
    assert complaints == []


def test_tokens_and_executions_that_are_refused_are_told_in_words(
    servers: Servers, organization: UUID, execution: UUID, open_page: Open, token: str
) -> None:
    """A wrong or expired token, an unknown execution; a good token then works."""
    page = open_page(execution, "wrong", live=False)
    expect(page.get_by_role("alert")).to_have_text("The token was refused: the token is not valid.")
    expect(connection(page)).to_have_text("Not connected")
    expect(page.get_by_label("Token")).to_be_focused()

    expired = sign_token(
        servers.settings,
        organization_id=organization,
        actor="ada",
        scopes=SCOPES,
        lifetime=timedelta(hours=-1),
    )
    page.get_by_label("Token").fill(expired)
    page.get_by_role("button", name="Open", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("The token was refused: the token has expired.")

    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Open", exact=True).click()
    expect(connection(page)).to_have_text("Live")

    unknown = open_page(uuid4(), token, live=False)
    expect(unknown.get_by_role("alert")).to_contain_text("There is no such execution here")
    expect(connection(unknown)).to_have_text("Not connected")


def test_a_batch_that_is_refused_is_told_beside_the_form(
    execution: UUID, open_page: Open, token: str
) -> None:
    """Metadata that is not JSON is not sent; of a wrong task, the right names are shown."""
    page = open_page(execution, token)
    add_by_hand(page, "review", "review_status", "reviewed", "{reviewer}")
    expect(page.get_by_role("alert")).to_contain_text("tag_metadata: must be JSON")
    expect(page.get_by_role("textbox", name="Metadata")).to_be_focused()
    add_by_hand(page, "unknown", "review_status", "reviewed")
    refused = page.get_by_role("alert")
    expect(refused).to_contain_text("there is no task “\u2068unknown\u2069” here")
    expect(refused).to_contain_text(
        "Its tasks are “\u2068extract_data\u2069”, “\u2068review\u2069”."
    )
    expect(page.get_by_label("Task", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(batches(page)).to_have_count(1)
    # Beyond what a JavaScript number can hold: added and removed as it was written.
    add_by_hand(page, "review", "number", "large", "9007199254740993")
    expect(tags_of(page, "review")).to_contain_text("9007199254740993")
    remove_by_hand(page, "number: large 9007199254740993 from review")
    expect(tags_of(page, "review")).to_have_count(0)


def test_a_batch_whose_answer_was_lost_is_sent_again_safely(
    execution: UUID, open_page: Open, token: str
) -> None:
    """The endpoint answers the same batch again, and nothing takes effect twice."""
    page = open_page(execution, token)

    def lose_the_answer(route: Route) -> None:
        route.fetch()
        route.abort()

    page.route("**/task-tags", lose_the_answer, times=1)
    add_by_hand(page, "review", "review_status", "reviewed")
    expect(page.get_by_role("alert")).to_contain_text("No answer")
    expect(tags_of(page, "review")).to_have_count(1)
    page.get_by_role("button", name="Send again").click()
    expect(page.get_by_text("Added (")).to_be_visible()
    expect(batches(page).first).to_contain_text("answered in")
    assert shown_revisions(page) == [2, 1]


def test_the_token_stays_in_the_tab_until_it_is_forgotten(
    execution: UUID, open_page: Open, token: str
) -> None:
    """It leaves the address bar at once; a reload works; who forgets it is asked for it again."""
    page = open_page(execution, token)
    assert page.url.endswith(f"/#execution={execution}")
    page.reload()
    expect(connection(page)).to_have_text("Live")
    page.get_by_role("button", name="Forget token").click()
    expect(page.locator("li.tag")).to_have_count(0)
    expect(page.get_by_label("Token")).to_be_focused()
    page.reload()
    expect(page.get_by_role("textbox", name="Flow execution")).to_have_value(str(execution))
    expect(connection(page)).to_have_text("Not connected")
    assert (
        page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
    )


def test_it_is_readable_on_a_phone_and_works_by_keyboard_alone(
    producer: TagProducer, execution: UUID, open_page: Open, token: str, complaints: list[str]
) -> None:
    """No scrolling sideways at 360 px; tab, type, enter; after a removal, focus moves on."""
    applied(producer, add(execution, "review", "t" * 100, "x" * 200, {"y" * 1000: ["z" * 1000]}))
    page = open_page(execution, token, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360

    tab_to(page, page.locator("summary").filter(has_text="Add a tag"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_label("Task", exact=True))
    for word in ("extract_data", "review_status", "reviewed"):
        page.keyboard.type(word)
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(tags_of(page, "extract_data")).to_have_count(2)
    expect(page.get_by_label("Tag", exact=True)).to_have_value("")

    tab_to(page, remove_button(page, "source: scanner-3 from extract_data"))
    for key in ("Enter", "Shift+Tab", "Enter"):
        page.keyboard.press(key)
    expect(tags_of(page, "extract_data")).to_have_count(1)
    expect(tags_of(page, "extract_data")).to_be_focused()
    tab_to(page, remove_button(page, "review_status: reviewed from extract_data"))
    for key in ("Enter", "Shift+Tab", "Enter"):
        page.keyboard.press(key)
    expect(tags_of(page, "extract_data")).to_have_count(0)
    expect(page.get_by_role("heading", name="extract_data")).to_be_focused()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert complaints == []


def tab_to(page: Page, place: Locator) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        if place.evaluate("node => node === document.activeElement"):
            return
    raise AssertionError("it can't be reached by the tab key")
