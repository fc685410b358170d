"""The live page in a real browser: its address, Back and Forward, links, and tabs side by side."""

from __future__ import annotations

from uuid import UUID, uuid4

from playwright.sync_api import Page, expect

from producers.client import TagProducer
from tests.support.browser import Open, address, alerts, connection
from tests.support.servers import Servers


def shows(page: Page, execution: UUID) -> None:
    expect(page.get_by_role("heading", name=f"Execution {execution}")).to_be_visible()
    expect(connection(page)).to_have_text("Live")
    assert f"#execution={execution}" in page.url


def link(servers: Servers, execution: UUID, task: str) -> str:
    return f"{servers.stack.endpoint_url}/#execution={execution}&task={task}"


def test_back_and_forward_lead_to_what_was_shown(
    servers: Servers, producer: TagProducer, execution: UUID, open_page: Open, token: str
) -> None:
    """To executions, and to the form at the beginning; not out of the page."""
    other = uuid4()
    producer.register(other, ["publish"])
    page = open_page(execution, token)
    page.get_by_role("button", name="Open another").click()
    page.get_by_role("textbox", name="Flow execution").fill(str(other))
    page.get_by_role("button", name="Open", exact=True).click()
    shows(page, other)
    page.go_back()
    shows(page, execution)
    expect(page.get_by_role("heading", name="extract_data")).to_be_visible()
    page.go_forward()
    shows(page, other)
    expect(page.get_by_role("heading", name="publish")).to_be_visible()

    page.goto(f"{servers.stack.endpoint_url}/#")
    expect(page.get_by_role("heading", name=f"Execution {other}")).to_be_hidden()
    page.get_by_role("textbox", name="Flow execution").fill(str(execution))
    page.get_by_role("button", name="Open", exact=True).click()
    shows(page, execution)
    page.go_back()
    expect(page.get_by_role("textbox", name="Flow execution")).to_be_visible()
    expect(connection(page)).to_have_text("Not connected")


def test_a_link_keeps_its_task_and_leads_to_it(
    execution: UUID, open_page: Open, token: str
) -> None:
    """Also after a reload; of a task that is not there, the names of those that are."""
    page = open_page(execution, f"{token}&task=review")
    for _ in range(2):
        expect(page.get_by_role("heading", name="review")).to_be_focused()
        assert page.url.endswith(f"/#execution={execution}&task=review")
        page.reload()
    wrong = open_page(execution, f"{token}&task=reviw")
    alerts(wrong, "There is no task “\u2068reviw\u2069” here.")
    alerts(wrong, "Its tasks are “\u2068extract_data\u2069”, “\u2068review\u2069”.")


def test_a_link_in_a_new_tab_takes_the_token_of_another_tab(
    servers: Servers, execution: UUID, open_page: Open, token: str
) -> None:
    """Nothing of it is stored; another browser is asked; who forgets it forgets it in all tabs."""
    first = open_page(execution, token)
    second = first.context.new_page()
    second.goto(link(servers, execution, "review"))
    shows(second, execution)
    expect(second.get_by_role("heading", name="review")).to_be_focused()
    assert second.url == link(servers, execution, "review")
    assert first.context.storage_state(indexed_db=True) == {"cookies": [], "origins": []}

    stranger = open_page(uuid4(), "wrong", live=False)
    expect(stranger.get_by_label("Token")).to_be_focused()
    fresh = stranger.context.new_page()
    fresh.goto(link(servers, execution, "review"))
    expect(fresh.get_by_label("Token")).to_be_focused()
    expect(connection(fresh)).to_have_text("Not connected")

    second.get_by_role("button", name="Forget token").click()
    for page in (first, second):
        expect(page.get_by_label("Token")).to_be_visible()
        expect(page.locator("li.tag")).to_have_count(0)
        page.reload()
        expect(page.get_by_label("Token")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


def test_a_tab_that_forgets_its_token_is_not_given_that_of_another(
    servers: Servers, organization: UUID, execution: UUID, open_page: Open, token: str
) -> None:
    """Of somebody else, who goes on working; a reload brings it back to nobody either."""
    adas = open_page(execution, token)
    graces = adas.context.new_page()
    graces.goto(
        address(servers.stack.endpoint_url, execution, servers.token(organization, sub="grace"))
    )
    shows(graces, execution)
    expect(graces.get_by_text("as grace")).to_be_visible()
    adas.get_by_role("button", name="Forget token").click()
    adas.reload()
    expect(adas.get_by_label("Token")).to_be_visible()
    expect(connection(adas)).to_have_text("Not connected")
    expect(connection(graces)).to_have_text("Live")
