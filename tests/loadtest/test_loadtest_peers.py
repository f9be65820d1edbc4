"""Peers: reading OpenAI streams of several dialects, refusing what a server does not know, comparing answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from loadtest import peer_loops
from loadtest.cli import main
from loadtest.compare import read_peer, report, run, share_equal, tokens_per_s, truth_of
from loadtest.lengths import parse_lengths
from loadtest.options import Options
from loadtest.outcome import Outcome
from loadtest.peer_loops import PeftPeer, outcomes_of
from loadtest.peer_servers import OpenAIServer, OurServer
from loadtest.peers import population
from loadtest.peft_loops import PeftAnswer, run_job
from loadtest.report import load_report
from loadtest.routes import Completions, Native, spread
from loadtest.stage import Stage
from loadtest.trace import Trace, TraceRequest, TraceSpec, build_trace


@dataclass
class OpenAIFake:
    """Speaks ``/v1/models`` and ``/v1/completions`` as other servers do: names adapters as models, counts in
    ``usage``, and sends two tokens in a chunk. Its answer depends on the model."""

    models: tuple[str, ...] = ("some/base", "a00000", "a00001")
    answers_anyone: bool = False
    lists: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_post("/v1/completions", self.completions)
        return app

    async def list_models(self, request: web.Request) -> web.Response:
        if not self.lists:
            return web.json_response({"detail": "no such page"}, status=404)
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        model, count = body["model"], body["max_tokens"]
        if model not in self.models and not self.answers_anyone:
            said = {"error": {"message": f"The model `{model}` does not exist.", "type": "NotFoundError"}}
            return web.json_response(said, status=404)
        if not body["stream"]:
            return web.json_response({"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for start in range(0, count, 2):
            text = "".join(f" {model}{number}" for number in range(start, min(count, start + 2)))
            await self._event(response, {"choices": [{"text": text, "finish_reason": None}], "usage": None})
        await self._event(response, {"choices": [{"text": "", "finish_reason": "length"}]})
        await self._event(response, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(self, response: web.StreamResponse, payload: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(payload).encode() + b"\n\n")


@pytest.fixture
def stage(tmp_path: Path, tiny_work: Path) -> Stage:
    options = Options(base="tiny", work=tiny_work, folder=tmp_path / "run", lengths=parse_lengths("2-4,3-5"))
    return Stage(options, Console(quiet=True))


@pytest.fixture
def trace() -> Trace:
    spec = TraceSpec(adapters=("a00000", "a00001"), lengths=parse_lengths("2-4,3-5"), rate_per_s=60, duration_s=0.2)
    return build_trace(spec)


def ask(tokens: int) -> TraceRequest:
    return TraceRequest(index=0, arrival_s=0.0, adapter="", text="a", prompt_tokens=1, max_new_tokens=tokens)


def chunk(text: str, **more: Any) -> bytes:
    return json.dumps({"choices": [{"text": text}], **more}).encode()


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 9}}).encode()


@pytest.mark.parametrize(
    ("pieces", "times", "error"),
    [
        ([chunk("a"), chunk("b"), chunk("c")], (1.0, 2.0, 3.0), None),
        ([chunk("a"), chunk("b"), chunk("c"), chunk("")], (1.0, 2.0, 3.0), None),
        ([chunk("a"), chunk(""), chunk("c"), USAGE], (1.0, 2.0, 3.0), None),
        ([chunk("a"), chunk("b"), chunk("c"), chunk(""), USAGE], (1.0, 2.0, 3.0), None),
        ([chunk("ab"), chunk("c"), USAGE], (1.0, 1.0, 2.0), None),
        ([chunk("a"), chunk("b")], (1.0, 2.0), "2 tokens of 3"),
        ([chunk("a"), b'{"error": {"type": "OutOfMemory"}}'], (1.0,), "stream error: OutOfMemory"),
        ([chunk("a"), b'{"error": "gone"}'], (1.0,), "stream error: gone"),
        ([], (), "empty stream"),
    ],
)
def test_streams_of_several_dialects_are_read(pieces: list[bytes], times: tuple[float, ...], error: str | None) -> None:
    answer = Completions().read(ask(3), pieces, [1.0 + number for number in range(len(pieces))])
    assert (answer.token_times_s, answer.error) == (times, error)
    assert answer.prompt_tokens == (9 if USAGE in pieces else None)


def test_tokens_are_spread_over_the_chunks_that_brought_them() -> None:
    assert spread([1.0, 2.0], 4) == (1.0, 1.0, 2.0, 2.0)
    assert spread([1.0, 2.0, 3.0], 3) == (1.0, 2.0, 3.0)
    assert spread([1.0], 3) == (1.0, 1.0, 1.0)
    assert spread([1.0, 2.0], 1) == (1.0,)
    assert spread([1.0], 0) == ()


def test_fields_of_a_server_go_into_the_body_by_model() -> None:
    fields = {"*": {"ignore_eos_token": True}, "a1": {"lora": [{"id": 0}]}}
    route = Completions(base_model="b", fields=fields)
    base, adapter = route.ask(ask(3)).body, route.ask(replace(ask(3), adapter="a1")).body
    assert (base["model"], base["ignore_eos_token"], "lora" in base) == ("b", True, False)
    assert (adapter["model"], adapter["ignore_eos_token"], adapter["lora"]) == ("a1", True, [{"id": 0}])


def test_a_foreign_server_plays_a_trace(stage: Stage, trace: Trace, serve: Callable[[Any], str]) -> None:
    fake = OpenAIFake()
    peer = OpenAIServer(stage=stage, name="other", url=f"{serve(fake.app())}/v1")
    assert peer.prepare(trace.adapters) == ()
    assert peer.base_model == "some/base"
    outcomes = peer.play(trace, paced=False)
    assert [one.error for one in outcomes] == [None] * len(trace.requests)
    assert all(one.text.startswith(f" {one.adapter}0 {one.adapter}1 ") for one in outcomes)
    assert [len(one.token_times_s) for one in outcomes] == [request.max_new_tokens for request in trace.requests]
    assert {one.prompt_tokens for one in outcomes} == {7}
    assert {body["model"] for body in fake.bodies if body["stream"]} == set(trace.adapters)
    paced = peer.play(trace, paced=True)
    assert [one.due_s for one in paced] == [request.arrival_s for request in trace.requests]


def test_an_unknown_adapter_is_said_with_the_way_out(stage: Stage, trace: Trace, serve: Callable[[Any], str]) -> None:
    url = serve(OpenAIFake(models=("some/base", "a00000")).app())
    with pytest.raises(RuntimeError) as refused:
        OpenAIServer(stage=stage, name="other", url=url).prepare(trace.adapters)
    for part in ("peer other", "'a00001'", "status 404", "does not exist", "--lora-modules a00001=", "--peer-fields"):
        assert part in str(refused.value)
    with pytest.raises(RuntimeError, match="base model 'nobody' does not answer"):
        OpenAIServer(stage=stage, name="other", url=url, base_model="nobody").prepare(())


def test_a_server_that_answers_to_any_name_is_shown_up(stage: Stage, trace: Trace, serve: Callable[[Any], str]) -> None:
    url = serve(OpenAIFake(answers_anyone=True).app())
    (note,) = OpenAIServer(stage=stage, name="other", url=url).prepare(trace.adapters)
    assert "names that it cannot know" in note
    told = {name: {"lora": []} for name in trace.adapters}
    assert OpenAIServer(stage=stage, name="other", url=url, fields=told).prepare(trace.adapters) == ()


def test_a_server_without_a_list_of_models_needs_the_bases_name(
    stage: Stage, trace: Trace, serve: Callable[[Any], str]
) -> None:
    url = serve(OpenAIFake(lists=False).app())
    with pytest.raises(RuntimeError, match="#MODEL"):
        OpenAIServer(stage=stage, name="other", url=url).prepare(())
    assert OpenAIServer(stage=stage, name="other", url=url, base_model="some/base").prepare(trace.adapters) == ()
    with pytest.raises(RuntimeError, match=r"nobody answers at http://127\.0\.0\.1:9/v1/models"):
        OpenAIServer(stage=stage, name="other", url="http://127.0.0.1:9").prepare(())


def test_peers_are_named_on_the_command_line(stage: Stage) -> None:
    def read(spec: str) -> Any:
        return read_peer(spec, stage, fields={"v": {"*": {"x": 1}}}, batch_size=4, window=2)

    assert isinstance(read("native").route, Native)
    assert isinstance(read("openai").route, Completions)
    assert (read("peft:sorted").name, read("peft:sorted").window) == ("peft:sorted", 2)
    other = read("openai:v=http://h:1/v1/#org/model")
    assert (other.name, other.url, other.base_model, other.fields) == (
        *("v", "http://h:1/v1", "org/model"),
        {"*": {"x": 1}},
    )
    assert read("openai:w=http://h:1").base_model is None
    assert read("openai:w=http://h:1#").base_model == "", "LoRAX calls its base by no name"
    for wrong in ("vllm", "peft:fast", "openai:x", "openai:=http://h:1", "openai:x=h:1"):
        with pytest.raises(ValueError, match="is not known"):
            read(wrong)


def test_adapters_of_a_trace_must_be_the_load_tests_own() -> None:
    assert population(["a00003", "a00001"]) == 4
    assert population([]) == 0
    with pytest.raises(ValueError, match="'sql'"):
        population(["a00000", "sql"])


@dataclass
class Scripted:
    """A peer whose answers are given beforehand, one set for each pass."""

    name: str
    passes: list[list[Outcome]]
    prepared: list[str] = field(default_factory=list)
    played: int = 0

    def prepare(self, adapters: Sequence[str]) -> tuple[str, ...]:
        self.prepared = list(adapters)
        return (f"{self.name} warns",)

    def play(self, trace: Trace, *, paced: bool) -> list[Outcome]:
        self.played += 1
        return self.passes[(self.played - 1) % len(self.passes)]


def outcome(index: int, text: str, *, end_s: float = 2.0, error: str | None = None) -> Outcome:
    times = () if error else (1.0, end_s)
    return Outcome(
        index=index, adapter="", due_s=0.0, sent_s=0.0, end_s=end_s, token_times_s=times, error=error, text=text
    )


def test_a_comparison_plays_there_and_back_and_counts_equal_answers(trace: Trace) -> None:
    truth = Scripted("peft:single", [[outcome(0, "a"), outcome(1, "b")]])
    first, second = [outcome(0, "a", end_s=1.5), outcome(1, "b")], [outcome(0, "a"), outcome(1, "", error="status 500")]
    found = run(trace, [server := Scripted("native", [first, second]), truth])
    assert (server.played, truth.played) == (2, 2)
    assert server.prepared == trace.adapters
    by_name = {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    assert by_name["native"]["answers equal to peft:single"] == 0.5
    assert by_name["native"]["failed"] == 1
    assert by_name["native"]["tokens/s"] == pytest.approx((4 / 2.0 + 2 / 2.0) / 2)
    assert by_name["peft:single"]["answers equal to peft:single"] == 1
    assert by_name["peft:single"]["TPOT p50 ms"] == pytest.approx(1000)
    for note in ("native failed: 1 x status 500", "native warns", "native: 50.0% of the answers differ"):
        assert any(note in said for said in found.notes)


def test_comparisons_that_cannot_be_are_refused(trace: Trace) -> None:
    twins = [Scripted("native", [[]]), Scripted("native", [[]])]
    with pytest.raises(ValueError, match="one name"):
        run(trace, twins)
    with pytest.raises(ValueError, match="no requests"):
        run(Trace(requests=()), twins[:1])


def test_figures_of_nothing_are_no_figures(trace: Trace) -> None:
    assert truth_of(["x", "peft:mixed", "peft:single"]) == "peft:mixed"
    assert truth_of(["x", "y"]) == "x"
    assert tokens_per_s([outcome(0, "", error="status 404")]) != tokens_per_s([outcome(0, "a")])
    nothing = report(trace, {"x": [[outcome(0, "", error="status 404")]]}, paced=False)
    assert nothing.rows[0][-2] == 1
    assert share_equal([[outcome(0, "a")], [outcome(0, "b")]], {0: "a"}) == 0


def test_pefts_batches_become_outcomes(trace: Trace) -> None:
    requests = trace.requests[:2]
    answer = PeftAnswer(
        seconds=9.0,
        num_tokens=3,
        num_batches=1,
        tokens={0: [1, 2], 1: [3]},
        times_s={0: [4.0, 5.0], 1: [4.0]},
        begun_s={0: 3.0, 1: 3.0},
    )
    first, second = outcomes_of(Trace(requests=requests), answer, lambda ids: str(ids), paced=True)
    assert (first.text, first.sent_s, first.end_s, second.end_s) == ("[1, 2]", 3.0, 5.0, 4.0)
    assert first.ttft_s == pytest.approx(4.0 - requests[0].arrival_s)
    assert outcomes_of(Trace(requests=requests), answer, str, paced=False)[1].ttft_s == 4.0


@pytest.mark.filterwarnings("ignore")
def test_our_server_is_played_by_both_routes(fake_server: Any, stage: Stage, trace: Trace) -> None:
    ours = Stage(replace(stage.options, url=fake_server.url), Console(quiet=True))
    native = OurServer(stage=ours, name="native").play(trace, paced=False)
    openai = OurServer(stage=ours, name="openai", route=Completions()).play(trace, paced=False)
    assert all(one.ok for one in native + openai)
    assert sorted(fake_server.uploads) == ["a00000", "a00001"]
    assert fake_server.bodies[-1]["model"] in trace.adapters
    assert len(list((ours.options.folder).glob("*.jsonl"))) == 4


@pytest.mark.filterwarnings("ignore")
def test_pefts_loops_are_played(stage: Stage, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []

    def here(job: Any, _: Path, on_done: Callable[[], None]) -> PeftAnswer:
        jobs.append(job)
        return run_job(job, on_done=lambda _: on_done())

    monkeypatch.setattr(peer_loops, "run_in_subprocess", here)
    peers = [PeftPeer(stage=stage, mode="single", batch_size=4), PeftPeer(stage=stage, mode="mixed", batch_size=4)]
    found = run(trace, peers, once=True)
    assert [(row[0], row[-2], row[-1]) for row in found.rows] == [("peft:single", 0, 1), ("peft:mixed", 0, 1)]
    assert [job.paced for job in jobs] == [False, False]
    assert Trace.load(Path(jobs[0].trace)).requests == trace.requests
    other = Stage(replace(stage.options, mixture="ia3"), Console(quiet=True))
    with pytest.raises(ValueError, match="LoRA only"):
        PeftPeer(stage=other, mode="mixed").prepare(())


@pytest.mark.filterwarnings("ignore")
def test_the_command_files_a_comparison(
    serve: Callable[[Any], str], trace: Trace, tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, fields = tmp_path / "trace.json", tmp_path / "fields.json"
    trace.save(path)
    fields.write_text('{"*": {"mine": 1}}')
    url = f"{serve(OpenAIFake().app())}/v1"
    common = ["--base", "tiny", "--work", str(tiny_work), "--out", str(tmp_path / "out")]
    peers = [f"--peer=openai:one={url}", f"--peer=openai:two={url}", f"--peer-fields=two={fields}"]
    assert main(["compare", str(path), *peers, *common]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    read = load_report(folder)
    assert [(row[0], row[-2], row[-1]) for row in read.rows] == [("one", 0, 1), ("two", 0, 1)]
    assert read.plot is not None
    assert read.plot.ticks == ("one", "two")
    assert main(["compare", str(path), peers[0], f"--peer-fields=three={fields}", *common]) == 1
    fields.write_text("[]")
    assert main(["compare", str(path), *peers, *common]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "'three', which is none of the peers" in said
    assert "write fields by model name" in said
