"""Adapters in a browser: uploads and their refusals, versions, pins, deletes, and text that stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.api_fakes import World, checkpoint, zipped
from tests.ui.conftest import Open

AXE = (Path(__file__).parent / "axe.min.js").read_text()
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


def row(page: Any, name: str) -> Any:
    return page.locator("tbody tr").filter(has=page.locator("th", has_text=name)).first


def archive(name: str, text: str = "new", **more: Any) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/zip", "buffer": zipped(checkpoint(text, **more))}


def serious(page: Any) -> list[Any]:
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
    return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found if each["impact"] != "minor"]


@pytest.fixture
def place(browse: Open, url: str) -> Any:
    page = browse(f"{url}/ui/#adapters")
    page.wait_for_selector("tbody tr >> nth=2")
    return page


def test_an_archive_is_uploaded(place: Any, url: str) -> None:
    place.set_input_files("input[type=file] >> nth=0", archive("my new adapter (2).zip"))
    assert place.input_value(".send input") == "my-new-adapter-2"
    place.fill(".send input", "mine")
    place.click(".send .primary")
    place.wait_for_selector(".accepted")
    said = place.inner_text(".accepted")
    assert "mine is version 1 now" in said
    assert "4 tensors bound to 2 places of the base" in said
    row(place, "mine").wait_for()
    with httpx.Client(base_url=url) as client:
        assert client.get("/adapters/mine").json()["version"] == 1
    place.click(".send .primary")
    place.wait_for_selector("text=mine has these very files already")


def test_a_folder_is_dropped(place: Any, url: str) -> None:
    files = {name: content.decode("latin-1") for name, content in checkpoint("dropped").items()}
    transfer = place.evaluate_handle(
        """files => {
            const data = new DataTransfer();
            for (const [name, text] of Object.entries({...files, "optimizer.pt": "x".repeat(100)}))
                data.items.add(new File([Uint8Array.from(text, c => c.charCodeAt(0))], name));
            return data;
        }""",
        files,
    )
    place.dispatch_event(".drop", "dragover", {"dataTransfer": transfer})
    place.wait_for_selector(".drop.over")
    place.dispatch_event(".drop", "drop", {"dataTransfer": transfer})
    place.wait_for_selector("text=2 files,")
    place.fill(".send input", "dropped")
    place.click(".send .primary")
    place.wait_for_selector(".accepted")
    with httpx.Client(base_url=url) as client:
        assert client.get("/adapters/dropped").json()["version"] == 1


def test_a_refused_upload_names_every_reason(place: Any, url: str) -> None:
    place.set_input_files("input[type=file] >> nth=0", archive("bad.zip", bad=f"shape [8, 4] {HOSTILE}"))
    for button, name in ((".send .primary", "Upload"), (".send button:has-text('Only check')", "Only check")):
        assert place.inner_text(button) == name
        place.click(button)
        refusal = place.wait_for_selector(".refusal:not([data-seen])")
        assert "2 reasons, and nothing was kept" in refusal.inner_text()
        items = place.locator(".refusal li")
        assert items.nth(0).locator("code").inner_text() == "q_proj.lora_A"
        assert HOSTILE in items.nth(0).inner_text(), "markup in a reason is text"
        assert items.nth(1).locator("span").inner_text() == "has a twin"
        place.evaluate("document.querySelector('.refusal').dataset.seen = 1")
    assert place.locator(".refusal img, .refusal script").count() == 0
    with httpx.Client(base_url=url) as client:
        assert client.get("/adapters/bad").status_code == 404


def test_what_is_no_checkpoint_is_not_sent(place: Any) -> None:
    place.set_input_files("input[type=file] >> nth=0", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"})
    assert "adapter_config.json" in place.inner_text(".refusal")
    assert place.is_disabled(".send .primary")
    place.set_input_files("input[type=file] >> nth=0", archive("x.zip"))
    place.fill(".send input", "no spaces, please")
    assert place.is_disabled(".send .primary")
    assert "begins with a letter" in place.inner_text("#name-hint")


def test_an_unreadable_archive_is_refused_in_words(place: Any) -> None:
    broken = {"name": "x.zip", "mimeType": "application/zip", "buffer": b"PK\x03\x04 this is none"}
    place.set_input_files("input[type=file] >> nth=0", broken)
    place.click(".send .primary")
    assert len(place.wait_for_selector(".refusal").inner_text()) > 30


def test_versions_are_rolled_back(place: Any, world: World) -> None:
    world.publish("plain", checkpoint("second"))
    place.wait_for_selector("tbody tr:has-text('of 2')", timeout=10_000)
    place.get_by_role("button", name="Versions of plain").click()
    place.wait_for_selector("dialog .versions li >> nth=1")
    assert not serious(place)
    place.get_by_role("button", name="Use this one").click()
    place.wait_for_selector("text=plain is version 1 now")
    place.wait_for_selector("tbody tr:has-text('plain'):has-text('v1')")
    assert world.catalog.resolve("plain").number == 1


def test_pins_are_set_and_lifted(place: Any, world: World) -> None:
    place.get_by_role("button", name="Pin soft", exact=True).click()
    place.wait_for_selector("text=soft is pinned")
    assert ("pin", world.adapters["soft"]) in world.engine.commands


def test_a_delete_asks_first(place: Any, world: World) -> None:
    place.get_by_role("button", name="Delete soft").click()
    place.wait_for_selector("dialog[open]")
    assert not serious(place)
    place.keyboard.press("Escape")
    place.wait_for_selector("dialog", state="detached")
    assert world.catalog.resolve("soft").number == 1
    place.get_by_role("button", name="Delete soft").click()
    place.locator("dialog").get_by_role("button", name="Delete soft").click()
    place.wait_for_selector("text=soft was deleted")
    assert row(place, "soft").count() == 0


def test_the_list_is_found_by_name(place: Any) -> None:
    place.fill(".list .find", "SOF")
    assert place.locator("tbody tr").count() == 1
    place.fill(".list .find", "nobody")
    place.wait_for_selector("text=No adapter has")


def test_hostile_names_and_texts_stay_text(browse: Open, url: str, world: World) -> None:
    with httpx.Client(base_url=url) as client:
        real = client.get("/adapters").json()["adapters"]
        info = client.get("/info").json()
    entries = [*real, real[0] | {"name": HOSTILE, "peft_type": HOSTILE, "problem": None}]
    entries.append(real[0] | {"name": "damaged", "problem": HOSTILE, "state": HOSTILE, "residency": HOSTILE})
    slots = [{"slot": 1, "adapter": HOSTILE, "bytes": 1, "in_flight": 1, "pinned": True}]
    live = {
        "time": 1, "state": HOSTILE, "slots": slots, "num_slots": 2,
        "queue": {"waiting": 1, "loading": 0, "adapters": [{"name": HOSTILE, "waiting": 1}]},
        "rows": [{"adapter": HOSTILE, "method": HOSTILE, "phase": "decode", "tokens": 3}],
        "tiers": {"device": {"adapters": 1, "bytes": 1}, "host": {"adapters": 1, "bytes": 1}}, "kv_usage": 0.1,
        "tokens_per_s": 1, "prompt_tokens_per_s": 1, "requests_per_s": 1, "step_ms": 1, "prefix_cache_hit_share": None,
    }  # fmt: skip
    said = {"index": 1, "token": {"id": 1, "text": HOSTILE, "special": False}, "generated_text": HOSTILE}
    said["details"] = {"finish_reason": HOSTILE, "prompt_tokens": 1, "generated_tokens": 1}
    said["adapter"] = {"name": HOSTILE, "peft_type": HOSTILE, "version": HOSTILE}
    page = browse(f"{url}/ui/")
    stream = {"content-type": "text/event-stream"}
    page.route("**/adapters", lambda route: route.fulfill(json={"adapters": entries}))
    page.route("**/info", lambda route: route.fulfill(json=info | {"model_id": HOSTILE}))
    page.route("**/v1/models/**", lambda route: route.fulfill(json={"tasks": ["generate"], "head": None}))
    page.add_init_script("delete globalThis.SharedWorker")  # without it a tab watches for itself, and can be lied to
    page.route("**/v1/events", lambda route: route.fulfill(body=f"data: {json.dumps(live)}\n\n", headers=stream))
    page.route("**/generate_stream*", lambda route: route.fulfill(body=f"data:{json.dumps(said)}\n\n", headers=stream))
    page.reload()
    page.get_by_role("button", name=HOSTILE).first.click()
    page.click(".primary")
    page.wait_for_selector("text=answers have ended", state="attached")
    assert page.locator(".said").first.inner_text() == HOSTILE
    page.click("nav a >> nth=1")
    row(page, "damaged").wait_for()
    page.wait_for_timeout(300)
    text = page.inner_text("body")
    assert text.count(HOSTILE) >= 6
    assert page.locator("img").count() == 1, "the page's own"
    assert page.locator("body script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(browse: Open, url: str, scheme: str, width: int) -> None:
    page = browse(f"{url}/ui/", color_scheme=scheme, viewport={"width": width, "height": 900})
    page.click("summary")
    page.wait_for_selector(".live h2")
    assert not serious(page)
    page.click(".primary")
    page.wait_for_selector("text=answers have ended", state="attached")
    page.wait_for_timeout(400)  # colours move for a moment
    assert not serious(page)
    page.goto(f"{url}/ui/#adapters")
    page.wait_for_selector("tbody tr >> nth=2")
    page.set_input_files("input[type=file] >> nth=0", archive("bad.zip", bad="too large"))
    page.click(".send .primary")
    page.wait_for_selector(".refusal")
    page.wait_for_timeout(400)
    assert not serious(page)
