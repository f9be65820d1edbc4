"""A real browser in front of a server over fakes. Without playwright and a Chromium these tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from peft_serve.core import BASE, Draw, Row, SamplingParams
from peft_serve.engine.snapshot import EngineSnapshot
from peft_serve.scheduling.slots import Resident
from tests.api.api_fakes import World, make_world
from tests.api.conftest import encoder as encoder
from tests.api.conftest import pair_tokenizer as pair_tokenizer
from tests.api.conftest import populate, running, served

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for each file of tests: while it is open, this thread has a running loop, and async tests cannot run."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install Debian's `chromium`, or name one in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


class Visible:
    """The fake engine's snapshot, with the rows and slots that a real engine tells of what it runs."""

    def __init__(self, world: World) -> None:
        self._engine = world.engine
        self._below = world.engine.snapshot
        self._num_steps = 0

    def __call__(self) -> EngineSnapshot:
        with self._engine._news:
            live = list(self._engine._live.values())
        adapters = list(dict.fromkeys(each.request.adapter for each in live if each.request.adapter != BASE))
        self._num_steps += bool(live)
        return replace(
            self._below(),
            num_steps=self._num_steps,
            last_rows=tuple(
                Row(
                    request=each.request.id,
                    slot=0 if each.request.adapter == BASE else adapters.index(each.request.adapter) + 1,
                    tokens=(1,),
                    start=len(each.request.prompt) + each.index,
                    blocks=(1,),
                    draw=Draw(params=SamplingParams(), seed=1, index=0),
                    prompt=(0, len(each.request.prompt)),
                )
                for each in live
            ),
            resident=tuple(
                Resident(adapter=adapter, slot=i + 1, num_bytes=1000, num_leases=1, is_pinned=False)
                for i, adapter in enumerate(adapters)
            ),
        )


@pytest.fixture
def world(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_world(tiny_tokenizer, tmp_path_factory.mktemp("world"))
    populate(made)
    made.engine.snapshot = Visible(made)  # type: ignore[method-assign]
    with running(made):
        yield made


@pytest.fixture
def url(world: World) -> Iterator[str]:
    with served(world) as address:
        yield address


Open = Callable[..., Any]


@pytest.fixture
def browse(browser: Any, url: str) -> Iterator[Open]:
    """Opens pages; at the end, none of them has seen an error of a script or of its policy.

    It asks for the server's address so that pages are closed before the server is.
    """
    contexts: list[Any] = []
    errors: list[str] = []

    def note(message: Any) -> None:
        # A refusal is an answer: the browser notes its status, and the page tells it.
        if message.type == "error" and "the server responded with a status" not in message.text:
            errors.append(message.text)

    def opened(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        page.wait_for_selector(".chip", state="attached")
        page.errors = errors
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors
