"""The dashboard in a real browser: what is published is seen, resolved by a click, and never run as markup."""

import os
import shutil
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.harness import PATIENCE, Server

StartServer = Callable[..., Server]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true",
        reason="needs a Chromium (Debian: apt-get install chromium)",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "CI needs a Chromium: apt-get install chromium"
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The dashboard, connected; a script error or a violated content policy fails the test."""
    page: Page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
    yield page
    page.close()
    assert complaints == []


def publish(server: Server, **geoid: object) -> dict[str, object]:
    response = httpx.post(f"{server.url}/v1/geoids", json=geoid)
    assert response.status_code in (200, 201), response.text
    return response.json()


def test_a_contradiction_appears_and_is_resolved_by_a_click(page: Page, server: Server) -> None:
    publish(server, text="Valve dash-7 as seen by Ada", symbolic_state={"subject": "dash-7", "valve": "open"})
    result = publish(server, text="Valve dash-7 as seen by Bo", symbolic_state={"subject": "dash-7", "valve": "shut"})
    (contradiction,) = result["contradictions"]  # type: ignore[misc]
    card = page.locator(f'[data-id="{contradiction["id"]}"]')
    expect(card).to_contain_text("as seen by Ada")
    expect(card).to_contain_text("as seen by Bo")
    expect(card).to_contain_text("valve: 'open' vs 'shut'")
    page.locator("#only-open").uncheck()
    card.get_by_role("button", name="collapse").click()
    expect(card).to_contain_text("resolved")
    stored = httpx.get(f"{server.url}/v1/contradictions/{contradiction['id']}").json()
    assert stored["state"] == "resolved"


def test_a_statement_is_published_from_the_page(page: Page, server: Server) -> None:
    page.locator("#say-text").fill("The east door of hall dash-9 is painted green.")
    page.locator("#say-agent").fill("dash-painter")
    page.locator("#say-publish").click()
    expect(page.locator("#statement-list")).to_contain_text("hall dash-9 is painted green")
    expect(page.locator("#statement-list")).to_contain_text("dash-painter")


def test_markup_in_a_statement_is_shown_not_run(page: Page, server: Server) -> None:
    markup = "<img src=x onerror=\"document.title='run'\"><b>dash-11</b>"
    publish(server, text=markup)
    expect(page.locator("#statement-list")).to_contain_text(markup)
    assert page.title() == "Kimera Stream"


def test_the_page_reconnects_after_a_restart(browser: Browser, start_server: StartServer) -> None:
    first = start_server()
    own: Page = browser.new_page()
    own.goto(first.url)
    expect(own.locator("#connection")).to_have_attribute("data-state", "connected")
    first.stop()
    expect(own.locator("#connection")).not_to_have_attribute("data-state", "connected")
    second = start_server(port=int(first.address.rpartition(":")[2]))
    publish(second, text="Said after the restart of dash-13.")
    expect(own.locator("#statement-list")).to_contain_text("after the restart of dash-13")
    own.close()
