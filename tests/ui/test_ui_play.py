"""The playground in a browser: several adapters, one prompt, side by side."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from peft_serve.core import FinishReason
from tests.api.api_fakes import World
from tests.api.conftest import served
from tests.ui.conftest import Open


def chosen(page: Any) -> list[str]:
    return page.eval_on_selector_all(".chip[aria-pressed=true]", "all => all.map(e => e.firstChild.nextSibling.data)")


def ask_for(page: Any, *names: str) -> None:
    """Choose exactly these."""
    page.wait_for_selector(".chip[aria-pressed=true]")
    for name in chosen(page):
        if name not in names:
            page.get_by_role("button", name=re.compile(rf"^{re.escape(name)}( .+)?$")).first.click()
    for name in names:
        if name not in chosen(page):
            page.get_by_role("button", name=re.compile(rf"^{re.escape(name)}( .+)?$")).first.click()
    assert sorted(chosen(page)) == sorted(names)


def test_it_loads_with_the_base_and_its_adapters(browse: Open, url: str) -> None:
    page = browse(f"{url}/")
    assert page.url == f"{url}/ui/", "a browser at the root finds the page"
    assert page.title() == "peft-serve playground"
    assert page.inner_text(".base b") == "tiny-base"
    page.wait_for_selector(".chip >> nth=3")  # the base is there before the others are listed
    names = page.eval_on_selector_all(".chip", "all => all.map(e => e.firstChild.nextSibling.data)")
    assert names == ["base", "complaints", "plain", "soft"]
    page.wait_for_selector(".strip .state:has-text('running')")


def test_three_adapters_answer_one_prompt_side_by_side(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    ask_for(page, "base", "plain", "soft")
    page.fill(".prompt textarea", "Hello there")
    page.click(".primary")
    page.wait_for_selector("text=All 3 answers have ended", state="attached")
    with httpx.Client(base_url=url) as client:
        for name in ("base", "plain", "soft"):
            where = "/generate" if name == "base" else f"/generate?adapter={name}"
            said = client.post(where, json={"inputs": "Hello there"}).json()["generated_text"]
            card = page.get_by_role("article", name=f"Answer of {name}")
            assert card.locator(".said").inner_text() == said.strip()
            assert re.fullmatch(r"[\d.]+ m?s", card.locator(".ttft").inner_text())
            assert float(card.locator(".rate").inner_text()) > 0
    assert page.locator(".lane").count() == 3
    assert page.locator(".lane .tick").count() >= 12, "a tick for each token"


def test_streams_run_together_and_the_live_view_shows_it(browse: Open, url: str, world: World) -> None:
    world.engine.step_s = 0.05
    page = browse(f"{url}/ui/")
    ask_for(page, "base", "plain", "soft")
    page.click("summary")
    page.fill("input[name=max_new_tokens]", "60")
    page.check("input[name=ignore_eos]")
    page.click(".primary")
    page.wait_for_selector(".live .row >> nth=2")
    titles = page.eval_on_selector_all(".live .row", "all => all.map(e => e.title.split(':')[0])")
    assert sorted(titles) == ["base", "plain", "soft"]
    colours = page.eval_on_selector_all(".live .row", "all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) == 3, "each adapter has its colour"
    tops = page.eval_on_selector_all(".answer", "all => all.map(e => getComputedStyle(e).borderTopColor)")
    assert set(tops) == set(colours), "the same in the batch and over its answer"
    assert page.locator(".answer .caret").count() == 3
    label = page.get_attribute(".live .rows", "aria-label")
    assert sorted(label.removeprefix("Rows of the last step: ").split(", ")) == ["base 1", "plain 1", "soft 1"]
    page.wait_for_selector("text=fullest step held 3 rows of 3 adapters")
    page.wait_for_selector("text=All 3 answers have ended", state="attached")
    page.wait_for_selector(".live .note:has-text('idle')")


def test_stop_ends_the_requests(browse: Open, url: str, world: World) -> None:
    world.engine.step_s = 0.05
    page = browse(f"{url}/ui/")
    ask_for(page, "plain", "soft")
    page.click("summary")
    page.fill("input[name=max_new_tokens]", "200")
    page.check("input[name=ignore_eos]")
    page.click(".primary")
    page.wait_for_selector(".answer .caret >> nth=1")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector(".answer .end:has-text('stopped') >> nth=1")
    for _ in range(100):
        if len(world.engine.cancelled) == 2:
            break
        page.wait_for_timeout(20)
    assert [reason for _, reason in world.engine.cancelled] == [FinishReason.CANCELLED] * 2


def test_choices_are_bars(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    ask_for(page, "complaints", "plain")
    page.click(".primary")
    page.wait_for_selector("text=All 2 answers have ended", state="attached")
    card = page.get_by_role("article", name="Answer of complaints")
    assert sorted(card.locator(".bars .label").all_inner_texts()) == ["complaint", "no complaint"]
    page.click("summary")
    page.fill("textarea[name=choices]", "yes\nno\n\nperhaps")
    page.click(".primary")
    page.wait_for_selector(".answer[aria-label='Answer of plain'] .bars li >> nth=2")


def test_its_own_words_can_be_switched_off(browse: Open, url: str, world: World) -> None:
    page = browse(f"{url}/ui/")
    ask_for(page, "complaints")
    page.uncheck(".ask > .check input")
    page.fill(".prompt textarea", "abc")
    page.click(".primary")
    page.wait_for_selector(".answer .end:has-text('complete')")
    assert page.locator(".bars").count() == 0
    assert world.parts.codec.decode(world.engine.seen[-1].prompt) == "abc"
    assert world.engine.seen[-1].sampling.max_new_tokens == 64


def test_a_refusal_stands_in_its_own_card(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    ask_for(page, "plain", "soft")
    page.fill(".prompt textarea", "x" * 450)
    page.click(".primary")
    page.wait_for_selector("text=All 2 answers have ended", state="attached")
    assert "512" in page.locator("[aria-label='Answer of soft'] .refusal").inner_text()
    assert page.locator("[aria-label='Answer of plain'] .refusal").count() == 0, "it fits without the soft prompt"


def test_a_combination_can_be_written(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    page.wait_for_selector(".chip[aria-pressed=true]")
    page.fill(".picker .find", "plain:0.7+soft")
    page.keyboard.press("Enter")
    assert "plain:0.7+soft" in chosen(page)
    ask_for(page, "plain:0.7+soft", "plain")
    page.click(".primary")
    page.wait_for_selector("text=All 2 answers have ended", state="attached")
    assert page.locator(".refusal").count() == 0


def test_heads_are_bars_entities_and_spans(browse: Open, encoder: World) -> None:
    with served(encoder) as url:
        page = browse(f"{url}/ui/")
        ask_for(page, "moods", "names", "reader", "plain")
        assert page.inner_text(".prompt span") == "Text", "it writes nothing, so nothing is prompted"
        assert page.locator("[name=temperature], [name=choices], .ask > .check, .facts :text('KV')").count() == 0
        page.fill(".prompt textarea", "where is anna")
        page.click("summary")
        page.fill("textarea[name=second]", "anna lives in new york")
        page.click(".primary")
        page.wait_for_selector("text=All 4 answers have ended", state="attached")
        assert sorted(page.locator("[aria-label='Answer of moods'] .label").all_inner_texts()) == ["glad", "mad", "sad"]
        assert page.locator("[aria-label='Answer of reader'] .said").count() == 1
        assert page.locator("[aria-label='Answer of plain'] .vector").count() == 1
        assert page.locator("[aria-label='Answer of names'] .refusal").count() == 1, "it reads no pairs, and says so"
        page.fill("textarea[name=second]", "")
        page.click(".primary")
        page.wait_for_selector("[aria-label='Answer of names'] .entities, [aria-label='Answer of names'] .note")
        page.context.close()


def test_the_keyboard_is_enough(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/")
    page.wait_for_selector(".chip[aria-pressed=true]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "MAIN"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.press("Tab")
    assert chosen(page) == ["complaints", "plain", "soft"], "the first adapters of the list"
    page.keyboard.press("Space")
    assert chosen(page) == ["base", "complaints", "plain", "soft"]
    page.focus(".prompt textarea")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=All 4 answers have ended", state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(browse: Open, url: str, scheme: str) -> None:
    page = browse(f"{url}/ui/", color_scheme=scheme)
    other = "dark" if scheme == "light" else "light"

    def is_dark() -> bool:
        return page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(246, 246, 249)"

    assert is_dark() == (scheme == "dark")
    page.get_by_role("button", name=f"Switch to {other} colours").click()
    page.wait_for_selector(f":root[data-theme={other}]", state="attached")
    assert is_dark() == (other == "dark")
    page.reload()
    page.wait_for_selector(f":root[data-theme={other}]", state="attached")


def test_a_phone_shows_all_of_it(browse: Open, url: str) -> None:
    page = browse(f"{url}/ui/", viewport={"width": 360, "height": 740})
    ask_for(page, "plain", "complaints")
    page.click(".primary")
    page.wait_for_selector("text=All 2 answers have ended", state="attached")
    for place in ("#play", "#adapters"):
        page.goto(f"{url}/ui/{place}")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
