"""The dashboard: its files, its policy, and how it behaves in a browser against a scripted stream."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from kimera_stream.api.dashboard import dashboard_routes
from kimera_stream.api.dashboard.routes import load_assets
from kimera_stream.api.problems import EXCEPTION_HANDLERS
from kimera_stream.infrastructure.settings import ApiSettings, Settings

CHROMIUM = shutil.which("chromium")


def settings_with(**api: Any) -> Settings:
    return Settings.model_construct(api=ApiSettings.model_validate(api))


def app_of(**api: Any) -> Starlette:
    return Starlette(routes=dashboard_routes(settings_with(**api)), exception_handlers=EXCEPTION_HANDLERS)  # type: ignore[arg-type]


@pytest.fixture
def app() -> Starlette:
    return app_of()


@pytest.fixture
async def http(app: Starlette) -> Any:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.anyio
async def test_the_page_and_its_files_are_served_under_a_strict_policy(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    linked = re.findall(r'(?:href|src)="(/dashboard/[^"]+)"', page.text)
    assert {"/dashboard/app.css", "/dashboard/app.js"} <= set(linked)
    imported = re.findall(r'from "(/dashboard/[^"]+)"', (await http.get("/dashboard/app.js")).text)
    for path in {*linked, *imported}:
        answer = await http.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.anyio
async def test_a_page_that_was_seen_is_not_sent_again(http: httpx.AsyncClient) -> None:
    first = await http.get("/")
    again = await http.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.anyio
async def test_unknown_files_are_not_found(http: httpx.AsyncClient) -> None:
    for path in ("/dashboard/secrets.txt", "/dashboard/..%2froutes.py", "/dashboard/__init__.py"):
        assert (await http.get(path)).status_code == 404


def test_it_can_be_switched_off() -> None:
    assert dashboard_routes(settings_with(dashboard=False)) == []


def test_nothing_in_it_reads_text_as_markup_or_asks_another_host() -> None:
    for name, asset in load_assets().items():
        text = asset.body.decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=\"|\sstyle=\"", text), name


# -- in a browser -----------------------------------------------------------------------------------------------------


def contradiction(number: int, a: str, b: str, **changes: Any) -> dict[str, Any]:
    components = dict.fromkeys(
        ("relatedness", "semantic", "embedding_misalignment", "layer_conflict", "symbolic_opposition", "composite"), 0.5
    )
    return {
        "id": f"c{number}",
        "a": f"a{number}",
        "b": f"b{number}",
        "a_text": a,
        "b_text": b,
        "score": 0.93,
        "components": components,
        "why": ["number: 40 vs 55"],
        "gradient_type": "semantic",
        "pulse_strength": 0.5,
        "decision": "collapse",
        "state": "open",
        "model": "m",
        "detected_at": int(time.time() * 1000),
        "offset": number,
        **changes,
    }


class Scripted:
    """A server side of the stream that a test drives from another thread."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.connects: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.live: list[dict[str, Any]] = []
        self.drop_at: int | None = None

    def event(self, channel: str, type: str, data: dict[str, Any]) -> None:
        self.log.append(
            {
                "op": "event",
                "channel": channel,
                "epoch": "epoch-1",
                "offset": len(self.log) + 1,
                "type": type,
                "ts": int(time.time() * 1000),
                "data": data,
            }
        )

    async def endpoint(self, socket: WebSocket) -> None:
        await socket.accept(subprotocol="kimera.v1.json")
        try:
            while True:
                command = await socket.receive_json()
                self.commands.append(command)
                await self.answer(socket, command)
        except WebSocketDisconnect:
            return

    async def answer(self, socket: WebSocket, command: dict[str, Any]) -> None:
        base = {"id": command["id"]}
        match command["op"]:
            case "connect":
                self.connects.append(command)
                if self.token is not None and command.get("token") != self.token:
                    error = {"code": "unauthorized", "message": "token: missing", "temporary": False}
                    await socket.send_json({"op": "error", **base, **error})
                    await socket.close(4500, "unauthorized")
                    return
                subs = [
                    {
                        "op": "subscribed",
                        "channel": sub["channel"],
                        "epoch": "epoch-1",
                        "offset": len(self.log),
                        "was_recovering": "since" in sub,
                        "recovered": "since" in sub,
                    }
                    for sub in command["subs"]
                ]
                server = {"name": "kimera-stream", "version": "9.9.9", "node": "n"}
                fields = {"session": "s", "epoch": "epoch-1", "offset": len(self.log), "ping": 25, "limits": {}}
                await socket.send_json({"op": "connected", **base, "server": server, "subs": subs, **fields})
                since = {sub["channel"]: sub.get("since", {"offset": 0})["offset"] for sub in command["subs"]}
                for event in list(self.log):
                    if event["offset"] > since[event["channel"]]:
                        await socket.send_json(event)
                if self.drop_at is not None and len(self.connects) == self.drop_at:
                    self.event("geoids", "geoid.created", {"id": "late", "text": "said while nobody listened"})
                    await socket.close(4000, "shutdown")
            case "resolve":
                await socket.send_json({"op": "resolved", **base, "scar": {}, "offset": 99})
            case "publish":
                geoid = {"id": "new", **command["geoid"]}
                found = [contradiction(50, "x", "y")]
                result = {"geoid": geoid, "offset": 7, "contradictions": found, "duplicate": False}
                await socket.send_json({"op": "published", **base, **result})


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
def url(script: Scripted) -> Iterator[str]:
    routes = [*dashboard_routes(settings_with()), WebSocketRoute("/v1/stream", script.endpoint)]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", ws="websockets-sansio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1360, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert problems == []


def fill(script: Scripted) -> None:
    script.event(
        "geoids", "geoid.created", {"id": "a1", "text": "The pump gives 40 litres.", "originator_agent_id": "scada"}
    )
    script.event(
        "geoids", "geoid.created", {"id": "b1", "text": "The pump gives 55 litres.", "originator_agent_id": "otis"}
    )
    script.event(
        "contradictions",
        "contradiction.found",
        contradiction(1, "The pump gives 40 litres.", "The pump gives <img src=x onerror=alert(1)> 55 litres."),
    )
    field = {
        "geoids": 2,
        "open_contradictions": 1,
        "entropy": 1.5,
        "temperature": 0.2,
        "activation": 0.4,
        "stability": 0.9,
    }
    script.event("field", "field.updated", field)
    script.event("stats", "stats.updated", {"rates": {"published_per_second": 12.5}, "subscribers": 3})


@pytest.mark.browser
def test_it_shows_what_comes_in(script: Scripted, url: str, page: Any) -> None:
    fill(script)
    page.goto(url)
    card = page.locator("#contradiction-list .card")
    card.wait_for()
    assert card.locator(".side-text p").all_inner_texts() == [
        "The pump gives 40 litres.",
        "The pump gives <img src=x onerror=alert(1)> 55 litres.",
    ]
    assert page.locator("img[src=x]").count() == 0
    assert "40" in card.locator("mark").all_inner_texts()
    assert card.locator(".source").all_inner_texts() == ["scada", "otis"]
    assert "number: 40 vs 55" in card.inner_text()
    assert page.locator("#statement-list li").count() == 2
    assert page.locator("#tile-geoids .figure").inner_text() == "2"
    assert "12.5" in page.locator("#stats").inner_text()
    assert page.locator("#connection").get_attribute("data-state") == "connected"


@pytest.mark.browser
def test_it_resumes_where_it_stopped(script: Scripted, url: str, page: Any) -> None:
    fill(script)
    script.drop_at = 1
    page.goto(url)
    page.get_by_text("said while nobody listened").wait_for()
    resumed = {sub["channel"]: sub.get("since") for sub in script.connects[1]["subs"]}
    assert resumed["geoids"] == {"epoch": "epoch-1", "offset": 2}
    assert resumed["contradictions"] == {"epoch": "epoch-1", "offset": 3}
    assert resumed["field"] is None
    assert page.locator("#statement-list li").count() == 3
    assert page.locator("#contradiction-list .card").count() == 1


@pytest.mark.browser
def test_resolving_publishing_and_filtering(script: Scripted, url: str, page: Any) -> None:
    fill(script)
    page.goto(url)
    page.locator("#contradiction-list .card").wait_for()
    page.get_by_role("button", name="surge").click()
    page.locator("#say-text").fill("A new statement")
    page.locator("#say-agent").fill("me")
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Publish").click()
    page.get_by_text("contradicts 1 statement").wait_for()
    sent = {command["op"]: command for command in script.commands}
    assert sent["resolve"]["contradiction_id"] == "c1"
    assert sent["resolve"]["decision"] == "surge"
    assert sent["publish"]["geoid"] == {"text": "A new statement", "originator_agent_id": "me"}
    page.locator("#min-score").fill("0.95")
    page.locator("#contradiction-empty").wait_for()
    assert page.locator("#contradiction-list .card").count() == 0


@pytest.mark.browser
def test_it_asks_for_a_token_and_connects_with_it(script: Scripted, url: str, page: Any) -> None:
    script.token = "secret"
    page.goto(url)
    page.locator("#token-input").fill("secret")
    page.get_by_role("button", name="Connect").click()
    page.locator("#connection[data-state=connected]").wait_for()
    assert [connect.get("token") for connect in script.connects] == [None, "secret"]


@pytest.mark.browser
def test_the_document_stays_bounded(script: Scripted, url: str, page: Any) -> None:
    for number in range(400):
        script.event(
            "contradictions", "contradiction.found", contradiction(number + 1, f"the {number}", f"not {number}")
        )
    for number in range(400):
        script.event("geoids", "geoid.created", {"id": f"g{number}", "text": f"number {number}"})
    page.goto(url)
    page.get_by_text("number 399").wait_for()
    page.wait_for_function("document.querySelectorAll('#contradiction-list .card').length > 0")
    assert page.locator("#contradiction-list .card").count() <= 120
    assert page.locator("#statement-list li").count() <= 150
