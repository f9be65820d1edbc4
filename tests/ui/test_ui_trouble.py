"""The page when things go wrong: a server that is gone, full, locked or slow, many tabs, and many adapters."""

from __future__ import annotations

import json
import shlex
from typing import Any

import httpx
import pytest

from tests.api.api_fakes import World
from tests.api.conftest import served
from tests.ui.conftest import Open
from tests.ui.test_ui_adapters import archive, row
from tests.ui.test_ui_play import ask_for, chosen

STREAM = {"content-type": "text/event-stream"}


def token(text: str) -> str:
    event = {"index": 1, "token": {"id": 1, "text": text, "special": False}, "generated_text": None}
    return f"data:{json.dumps(event)}\n\n"


def card(page: Any, name: str) -> Any:
    return page.get_by_role("article", name=f"Answer of {name}")


def test_a_server_that_is_gone_is_told(browse: Open, world: World) -> None:
    with served(world) as url:
        page = browse(f"{url}/ui/")
        page.wait_for_selector(".strip .state:has-text('running')")
        ask_for(page, "plain")
    page.wait_for_selector(".strip .state:has-text('no connection')")
    page.wait_for_selector("[role=alert]:has-text('The server does not answer.')")
    page.click(".primary")
    card(page, "plain").get_by_text("Is it still running?").wait_for()
    assert card(page, "plain").locator(".end").inner_text() == "broke off"
    page.errors.clear()  # the browser notes each connection that is refused


def test_an_answer_that_breaks_off_keeps_what_was_said(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    ask_for(page, "plain")
    page.route("**/generate_stream*", lambda route: route.fulfill(body=token("half a "), headers=STREAM))
    page.click(".primary")
    card(page, "plain").get_by_text("The answer broke off").wait_for()
    assert card(page, "plain").locator(".said").inner_text().strip() == "half a"


def test_a_full_server_can_be_asked_again(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    ask_for(page, "plain", "soft")
    problem = {"detail": "the queue is full", "code": "queue_full"}
    full = "**/generate_stream?adapter=soft"
    page.route(full, lambda route: route.fulfill(status=429, json=problem, headers={"retry-after": "1"}))
    page.click(".primary")
    page.wait_for_selector("text=All 2 answers have ended", state="attached")
    assert card(page, "soft").locator(".end").inner_text() == "server is full"
    assert "the queue is full" in card(page, "soft").inner_text()
    said = card(page, "plain").locator(".said").inner_text()
    page.unroute(full)
    card(page, "soft").get_by_role("button", name="Ask again").click()
    card(page, "soft").locator(".end.cut, .end.good").wait_for()
    assert card(page, "soft").locator(".said").inner_text()
    assert card(page, "plain").locator(".said").inner_text() == said, "the others stay as they are"


def test_many_tabs_share_one_connection(browse: Open, url: str, world: World) -> None:
    page = browse(f"{url}/ui/")
    tabs = [page]
    for _ in range(6):  # seven in all, and a browser opens six connections
        tab = page.context.new_page()
        tab.goto(f"{url}/ui/")
        tabs.append(tab)
    for tab in tabs:
        tab.wait_for_selector(".strip .state:has-text('running')")
    ask_for(tabs[3], "plain", "soft")
    tabs[3].click(".primary")
    tabs[3].wait_for_selector("text=All 2 answers have ended", state="attached")
    assert all(tab.locator(".slots").count() == 1 for tab in tabs)


def test_an_upload_that_is_too_large_is_not_sent(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/#adapters")
    info = httpx.get(f"{url}/info").json()
    assert info["max_adapter_bytes"] > 1_000_000
    page.route("**/info", lambda route: route.fulfill(json=info | {"max_adapter_bytes": 100}))
    page.reload()
    page.wait_for_selector("tbody tr >> nth=2")
    page.set_input_files("input[type=file] >> nth=0", archive("big.zip"))
    assert "this server takes 100 B at most" in page.inner_text(".refusal")
    assert page.is_disabled(".send .primary")


def test_a_key_is_asked_for_and_sent(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    sent: list[str | None] = []

    def lock(route: Any) -> None:
        sent.append(route.request.headers.get("authorization"))
        if sent[-1] == "Bearer mine":
            route.continue_()
        else:
            route.fulfill(status=401, json={"detail": "this server asks for a key", "code": "unauthorized"})

    for path in ("info", "adapters", "generate_stream*", "v1/models/**"):
        page.route(f"**/{path}", lock)
    page.reload()
    for text in ("wrong", "mine"):
        page.get_by_label("Key").fill(text)
        page.get_by_role("button", name="Use it").click()
        if text == "wrong":
            page.wait_for_selector("text=It did not take the last one.")
    ask_for(page, "plain")
    sent.clear()
    page.click(".primary")
    card(page, "plain").locator(".end.cut, .end.good").wait_for()
    assert sent
    assert set(sent) == {"Bearer mine"}


def test_forty_adapters_stay_a_few_lines(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    real = httpx.get(f"{url}/adapters").json()["adapters"]
    many = [*real, *(real[0] | {"name": f"team-{i % 5}-task-{i}"} for i in range(40))]
    page.route("**/adapters", lambda route: route.fulfill(json={"adapters": many}))
    page.reload()
    page.wait_for_selector(".chips :text('32 more')")
    assert page.locator(".chip").count() == 12
    page.click(".chips :text('32 more')")
    assert page.locator(".chip").count() == 44
    for name in ("task-38", "task-39"):
        page.fill(".picker .find", name)
        page.keyboard.press("Enter")
    assert "team-4-task-39" in chosen(page)
    assert page.is_disabled(".chip[aria-pressed=false] >> nth=0"), "five at a time"
    page.fill(".picker .find", "zzz")
    page.wait_for_selector("text=No adapter has “zzz” in its name.")


def test_an_address_chooses_who_is_asked(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/#play?with=plain,soft")
    page.wait_for_selector(".chip[aria-pressed=true]")
    assert chosen(page) == ["plain", "soft"]
    page.click("nav a >> nth=1")
    row(page, "soft").get_by_role("link", name="Ask soft").click()
    page.wait_for_selector("legend:has-text('1 chosen')")
    assert chosen(page) == ["soft"]


def test_files_dragged_over_the_playground_open_the_other_place(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    transfer = page.evaluate_handle(
        "() => { const data = new DataTransfer(); data.items.add(new File(['x'], 'notes.txt')); return data; }"
    )
    page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    page.wait_for_selector(".drop")
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    page.wait_for_selector(".drop.over")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".refusal")


def test_a_question_is_copied_as_a_command(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/", permissions=["clipboard-read", "clipboard-write"])
    ask_for(page, "plain")
    page.fill(".prompt textarea", 'it\'s\n"hot" مرحبا')
    page.click(".primary")
    card(page, "plain").get_by_role("button", name="Copy as a curl command").click()
    card(page, "plain").get_by_role("button", name="Copied").wait_for()
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[:2] == ["curl", "-N"]
    address, body = words[2], words[words.index("-d") + 1]
    events = httpx.post(address, content=body, headers={"content-type": "application/json"}).text.split("\n\n")
    said = json.loads(events[-2 if not events[-1] else -1].removeprefix("data:"))["generated_text"]
    assert card(page, "plain").locator(".said").inner_text() == said.strip()


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_for_those_who_want_none(browse: Open, url: str, world: World, motion: str) -> None:
    world.engine.step_s = 0.05
    page = browse(f"{url}/ui/", reduced_motion=motion)
    ask_for(page, "plain")
    page.click(".primary")
    page.wait_for_selector(".caret")
    if motion == "no-preference":
        page.wait_for_function("document.getAnimations().length > 0")  # it begins with the next frame
    else:
        assert page.evaluate("document.getAnimations().length") == 0
