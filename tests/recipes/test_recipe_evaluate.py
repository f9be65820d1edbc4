"""`evaluate.py` against a small fake of the server."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cards
import evaluate
import pytest
from baselines import Figures
from tasks import TASKS, Row


class FakeServer(ThreadingHTTPServer):
    """Answers *spam* where the text says win, *complaint* where it says bad; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        query = urllib.parse.urlsplit(self.path)
        adapter = urllib.parse.parse_qs(query.query)["adapter"][0]
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((adapter, body, self.headers.get("authorization")))
        if adapter == "trec":
            self._send(404, {"code": "model_not_found"})
            return
        says = {"sms-spam": ("win", "spam", "ham")}.get(adapter, ("bad", "complaint", "no complaint"))
        word, yes, no = says
        self._send(200, [{"generated_text": yes if word in text else no} for text in body["inputs"]])

    def _send(self, status: int, content: Any) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as it:
        thread = threading.Thread(target=it.serve_forever, daemon=True)
        thread.start()
        yield it
        it.shutdown()
        thread.join()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seventy invented rows a task; one in ten is labelled against the word the fake looks for."""
    spec = {"sms-spam": ("win", "spam", "ham"), "twitter-complaints": ("bad", "complaint", "no complaint")}
    for name, (word, yes, no) in spec.items():
        lines = []
        for i in range(140):
            is_yes = i % 3 == 0
            says = is_yes != (i % 20 >= 18)
            text = f"{word if says else 'fine'} thing number {i} for you"
            record = {"split": "test" if i % 2 else "train", "text": text, "label": yes if is_yes else no}
            lines.append(json.dumps(record) + "\n")
        (tmp_path / TASKS[name].file).write_text("".join(lines), encoding="utf-8")
    (tmp_path / TASKS["trec"].file).write_text(
        json.dumps({"split": "test", "text": "Who is it ?", "label": "person"}) + "\n", encoding="utf-8"
    )
    return tmp_path


def test_figures_come_from_the_servers_answers(server: FakeServer, data: Path) -> None:
    chosen = ["--adapter", "sms-spam", "--adapter", "twitter-complaints"]
    scored = evaluate.main(["--url", server.url, "--data", str(data), *chosen, "--api-key", "k"])
    assert scored["sms-spam"] == scored["twitter-complaints"]
    assert scored["sms-spam"].rows == 70
    assert scored["sms-spam"].accuracy == 0.9
    adapters = [adapter for adapter, _, _ in server.asked]
    assert adapters.count("sms-spam") == adapters.count("twitter-complaints") == 3
    for _, body, authorization in server.asked:
        assert len(body["inputs"]) <= 32
        assert body["parameters"] == {"details": True}
        assert authorization == "Bearer k"


def test_answers_keep_the_order_of_the_rows(server: FakeServer) -> None:
    rows = [Row(split="test", text=f"{'win' if i % 7 else 'no'} {i}", label="spam") for i in range(100)]
    found = evaluate.answers(evaluate.Client(url=server.url), {"sms-spam": rows}, batch_rows=9, in_flight=4)
    assert found["sms-spam"] == ["spam" if i % 7 else "ham" for i in range(100)]


def test_adapters_take_turns() -> None:
    rows = [Row(split="test", text="t", label="spam")] * 5
    streams = [evaluate.batches_of("a", rows, 2), evaluate.batches_of("b", rows[:1], 2)]
    assert [batch.adapter for batch in evaluate.mixed(streams)] == ["a", "b", "a", "a"]


def test_the_servers_refusal_is_shown(server: FakeServer, data: Path) -> None:
    with pytest.raises(SystemExit, match=r"trec: 404 .*model_not_found"):
        evaluate.main(["--url", server.url, "--data", str(data), "--adapter", "trec"])


def test_an_adapter_without_a_recipe_is_refused(data: Path) -> None:
    with pytest.raises(SystemExit, match="no recipe for nonesuch"):
        evaluate.main(["--data", str(data), "--adapter", "nonesuch"])


def test_cards_take_no_partial_figures(data: Path) -> None:
    with pytest.raises(SystemExit, match="whole held-out split"):
        evaluate.main(["--data", str(data), "--limit", "5", "--write-cards"])


def test_cards_are_rewritten_between_the_markers(
    server: FakeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "demo-llama" / "sms-spam" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text(f"before\n{cards.START}\nold\n{cards.END}\nafter\n", encoding="utf-8")
    overview = tmp_path / "README.md"
    overview.write_text("| adapter |\n|---|\n| [sms-spam](demo-llama/sms-spam/) | ? |\nend\n", encoding="utf-8")
    monkeypatch.setattr(evaluate, "ADAPTERS", tmp_path)
    options = ["--url", server.url, "--data", str(data), "--adapter", "sms-spam", "--write-cards"]
    evaluate.main(options)
    text = card.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| this adapter, through the server | 90.0 |" in text
    assert "TF-IDF" in text
    assert "| [sms-spam](demo-llama/sms-spam/) | LoRA | 70 | 90.0 / " in overview.read_text(encoding="utf-8")
    evaluate.main(options)
    assert card.read_text(encoding="utf-8") == text, "a second run changes nothing"


def test_the_verdict_is_honest_both_ways() -> None:
    better = Figures(accuracy=0.9, macro_f1=0.9, rows=10)
    worse = Figures(accuracy=0.8, macro_f1=0.8, rows=10)
    assert cards.verdict(better, worse) == "Above TF-IDF by 10.0 points of accuracy."
    assert "TF-IDF with logistic regression is better by 10.0 points" in cards.verdict(worse, better)


def test_a_row_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no line that begins"):
        cards.with_row("| adapter |\n", "| [trec](demo-llama/trec/) | LoRA |")


def test_a_card_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no figures block"):
        cards.with_block("plain text", "block")
