"""llama.cpp as a peer: the files that it is given, what is asked of it, and what its answers are read as."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from rich.console import Console
from safetensors.torch import load_file

from loadtest.cli import main
from loadtest.compare import read_peer
from loadtest.contestants import LlamaSetting, llama_server
from loadtest.gguf_file import GgufTensor, write_gguf
from loadtest.gguf_models import adapter_to_gguf, base_to_gguf
from loadtest.lengths import parse_lengths
from loadtest.llama_route import LlamaCpp
from loadtest.llama_server import LlamaCommand, LlamaFiles, adapter_ids
from loadtest.options import Options
from loadtest.peer_llama import LlamaServer
from loadtest.report import load_report
from loadtest.server import RunningServer, quiet
from loadtest.stage import Stage
from loadtest.trace import Trace, TraceRequest, TraceSpec, build_trace

TYPES: dict[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}

pytestmark = pytest.mark.filterwarnings("ignore")  # peft uses names that transformers is about to drop


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The facts and tensors of a file, read by the format's description."""
    content = path.read_bytes()
    file = BytesIO(content)

    def number(form: str) -> Any:
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def text() -> str:
        return file.read(number("<Q")).decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, length = number("<I"), number("<Q")
            return [value(inner) for _ in range(length)]
        return number(SCALARS[kind])

    assert (file.read(4), number("<I")) == (b"GGUF", 3)
    num_tensors, num_facts = number("<Q"), number("<Q")
    facts = {text(): value(number("<I")) for _ in range(num_facts)}
    listed = []
    for _ in range(num_tensors):
        name, shape = text(), [number("<Q") for _ in range(number("<I"))]
        listed.append((name, shape[::-1], TYPES[number("<I")], number("<Q")))
    start = -(-file.tell() // 32) * 32
    tensors = {}
    for name, shape, dtype, place in listed:
        assert place % 32 == 0
        size = torch.Size(shape).numel()
        data = torch.frombuffer(bytearray(content), dtype=dtype, count=size, offset=start + place)
        tensors[name] = data.view(shape)
    return facts, tensors


def test_a_file_holds_its_facts_and_tensors_on_boundaries(tmp_path: Path) -> None:
    odd, even = torch.arange(3, dtype=torch.float32), torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    tensors = [
        GgufTensor(name="odd", shape=(3,), dtype="float32", num_bytes=12, read=lambda: odd.numpy().tobytes()),
        GgufTensor(
            name="even",
            shape=(2, 3),
            dtype="bfloat16",
            num_bytes=12,
            read=lambda: even.view(torch.uint8).numpy().tobytes(),
        ),
    ]
    given: dict[str, Any] = {"a": 3, "b": 1.5, "c": "wörd", "d": False, "e": ["x", "yz"], "f": [1, -3]}
    facts, found = read_gguf(write_gguf(tmp_path / "folder" / "a.gguf", given, tensors))
    assert facts == given
    assert torch.equal(found["odd"], odd)
    assert torch.equal(found["even"], even)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.gguf"]
    short = replace(tensors[0], num_bytes=11)
    with pytest.raises(AssertionError, match="odd holds 12 bytes"):
        write_gguf(tmp_path / "b.gguf", {}, [short])
    assert not (tmp_path / "b.gguf").exists(), "half a file has no name of a whole one"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_becomes_a_file_of_the_same_weights(tiny_base: Path, tmp_path: Path, dtype: str) -> None:
    facts, found = read_gguf(base_to_gguf(tiny_base, tmp_path / "base.gguf", dtype=dtype))
    weights = load_file(tiny_base / "model.safetensors")
    kind: torch.dtype = getattr(torch, dtype)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    assert len(found) == len(weights)
    for ours, theirs in names.items():
        wanted = weights[ours].to(kind if weights[ours].dim() > 1 else torch.float32)
        assert torch.equal(found[theirs], wanted), theirs
    config = json.loads((tiny_base / "config.json").read_text())
    assert facts["general.architecture"] == "qwen2"
    assert (facts["qwen2.embedding_length"], facts["qwen2.feed_forward_length"]) == (128, 256)
    assert (facts["qwen2.attention.head_count"], facts["qwen2.attention.head_count_kv"]) == (2, 1)
    assert facts["qwen2.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    vocabulary = json.loads((tiny_base / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = facts["tokenizer.ggml.tokens"]
    assert len(tokens) == config["vocab_size"]
    assert all(vocabulary[token] == number for number, token in enumerate(tokens))
    assert facts["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert all(len(merge.split(" ")) == 2 for merge in facts["tokenizer.ggml.merges"])


def test_an_adapter_becomes_a_file_and_others_are_refused(mixed_adapters: list[Path], tmp_path: Path) -> None:
    folder = mixed_adapters[1]
    facts, found = read_gguf(adapter_to_gguf(folder, tmp_path / "a.gguf"))
    weights = load_file(folder / "adapter_model.safetensors")
    assert (facts["general.type"], facts["adapter.type"], facts["adapter.lora.alpha"]) == ("adapter", "lora", 32.0)
    assert len(found) == len(weights)
    gate = "base_model.model.model.layers.1.mlp.gate_proj.lora_{}.weight"
    assert torch.equal(found["blk.1.ffn_gate.weight.lora_a"], weights[gate.format("A")])
    assert torch.equal(found["blk.1.ffn_gate.weight.lora_b"], weights[gate.format("B")])
    with pytest.raises(ValueError, match=r"is IA3, and llama\.cpp's server is given plain LoRA only"):
        adapter_to_gguf(mixed_adapters[2], tmp_path / "b.gguf")
    odd = tmp_path / "odd"
    odd.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    with pytest.raises(ValueError, match="sets use_rslora"):
        adapter_to_gguf(odd, tmp_path / "b.gguf")
    (odd / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match=r"'gemma' model.*convert_hf_to_gguf"):
        base_to_gguf(odd, tmp_path / "b.gguf")


def ask(tokens: int, adapter: str = "") -> TraceRequest:
    return TraceRequest(index=0, arrival_s=0.0, adapter=adapter, text=" a", prompt_tokens=1, max_new_tokens=tokens)


def test_an_adapter_is_asked_for_by_its_number_and_the_base_by_none() -> None:
    route = LlamaCpp(ids={"a00000": 4, "a00001": 7}, fields={"cache_prompt": False})
    body = route.ask(ask(3, "a00001")).body
    assert body["lora"] == [{"id": 7, "scale": 1.0}]
    assert (body["prompt"], body["n_predict"], body["ignore_eos"], body["stream"]) == (" a", 3, True, True)
    assert (body["temperature"], body["samplers"], body["top_k"], body["cache_prompt"]) == (0, ["top_k"], 1, False)
    assert route.ask(ask(3)).body["lora"] == [{"id": 0, "scale": 0.0}], "an empty list would mean all, at their own"
    assert LlamaCpp().ask(ask(3)).body["lora"] == []
    with pytest.raises(ValueError, match="'a00002' is not among those"):
        route.ask(ask(3, "a00002"))


def event(content: str, **more: Any) -> bytes:
    return json.dumps({"content": content, "stop": False, **more}).encode()


END = event("", stop=True, tokens_predicted=3, tokens_evaluated=9)


@pytest.mark.parametrize(
    ("pieces", "times", "error"),
    [
        ([event("a"), event("b"), event("c"), END], (1.0, 2.0, 3.0), None),
        ([event("ab"), event("c"), END], (1.0, 1.0, 2.0), None),
        ([event("a"), event("b"), event("c", stop=True, tokens_predicted=2)], (1.0, 2.0), "2 tokens of 3"),
        ([event("a"), event("b")], (1.0, 2.0), "cut off"),
        ([event("a"), b'{"error": {"type": "server_error"}}'], (1.0,), "stream error: server_error"),
        ([event("a"), b'{"error": "gone"}'], (1.0,), "stream error: gone"),
        ([], (), "empty stream"),
    ],
)
def test_its_stream_is_read(pieces: list[bytes], times: tuple[float, ...], error: str | None) -> None:
    answer = LlamaCpp().read(ask(3), pieces, [1.0 + number for number in range(len(pieces))])
    assert (answer.token_times_s, answer.error) == (times, error)
    assert answer.prompt_tokens == (9 if END in pieces else None)
    if error is None:
        assert answer.text == "abc"


@dataclass
class LlamaFake:
    """Speaks as llama.cpp's server does: adapters by number, all of them on where a request's list is empty."""

    paths: tuple[str, ...] = ("some/a00001.gguf", "some/a00000.gguf")
    listed: Any = None
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/lora-adapters", self.adapters)
        app.router.add_post("/completion", self.completion)
        return app

    async def adapters(self, request: web.Request) -> web.Response:
        found = [{"id": number, "path": path, "scale": 0.0} for number, path in enumerate(self.paths)]
        return web.json_response(found if self.listed is None else self.listed)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        on = [Path(self.paths[one["id"]]).stem for one in body["lora"] if one["scale"]]
        said = "+".join(on) if body["lora"] else "all"
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(body["n_predict"]):
            await self._event(response, {"content": f" {said}{number}", "tokens": [number], "stop": False})
        last = {"content": "", "stop": True, "tokens_predicted": body["n_predict"], "tokens_evaluated": 5}
        await self._event(response, last)
        return response

    async def _event(self, response: web.StreamResponse, payload: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(payload).encode() + b"\n\n")


@pytest.fixture
def stage(tmp_path: Path, tiny_work: Path) -> Stage:
    options = Options(base="tiny", work=tiny_work, folder=tmp_path / "run", lengths=parse_lengths("2-4,3-5"))
    return Stage(options, Console(quiet=True))


@pytest.fixture
def trace() -> Trace:
    spec = TraceSpec(adapters=("a00000", "a00001"), lengths=parse_lengths("2-4,3-5"), num_requests=6)
    named = build_trace(spec).requests
    return Trace(requests=(*named, replace(named[0], index=len(named), adapter="")))


def test_it_plays_a_trace_each_request_with_its_adapter(
    stage: Stage, trace: Trace, serve: Callable[[Any], str]
) -> None:
    fake = LlamaFake()
    peer = read_peer(f"llamacpp:other={serve(fake.app())}/", stage, fields={"other": {"*": {"mine": 1}}})
    assert isinstance(peer, LlamaServer)
    assert peer.prepare(trace.adapters) == ()
    assert peer.ids == {"a00001": 0, "a00000": 1}
    outcomes = peer.play(trace, paced=False)
    assert [one.error for one in outcomes] == [None] * len(trace.requests)
    assert all(one.text.startswith(f" {one.adapter}0 {one.adapter}1 ") for one in outcomes)
    assert [len(one.token_times_s) for one in outcomes] == [request.max_new_tokens for request in trace.requests]
    assert {one.prompt_tokens for one in outcomes} == {5}
    assert all(body["mine"] == 1 for body in fake.bodies)


def test_a_server_without_the_adapters_is_said_with_the_way_out(
    stage: Stage, trace: Trace, serve: Callable[[Any], str]
) -> None:
    url = serve(LlamaFake(paths=("a00000.gguf",)).app())
    with pytest.raises(RuntimeError, match=r"started without adapter 'a00001'.*--lora a00001.gguf.*make-gguf"):
        LlamaServer(stage=stage, name="other", url=url).prepare(trace.adapters)
    with pytest.raises(RuntimeError, match=r"peer other: nobody answers at http://127\.0\.0\.1:9 "):
        LlamaServer(stage=stage, name="other", url="http://127.0.0.1:9").prepare(())
    with pytest.raises(RuntimeError, match="status 404"):
        adapter_ids(serve(web.Application()), peer="other")
    with pytest.raises(RuntimeError, match="lists no adapters as"):
        adapter_ids(serve(LlamaFake(listed={"a": 1}).app()), peer="other")
    for wrong in ("llamacpp", "llamacpp:x", "llamacpp:=http://h:1", "llamacpp:x=h:1"):
        with pytest.raises(ValueError, match="is not known"):
            read_peer(wrong, stage, fields={})


def test_it_is_compared_from_the_command_line(
    serve: Callable[[Any], str], trace: Trace, tiny_work: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    trace.save(path)
    peers = [f"--peer=llamacpp:{name}={serve(LlamaFake().app())}" for name in ("one", "two")]
    common = ["--base", "tiny", "--work", str(tiny_work), "--out", str(tmp_path / "out"), "--once"]
    assert main(["compare", str(path), *peers, *common]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert [(row[0], row[-2], row[-1]) for row in load_report(folder).rows] == [("one", 0, 1), ("two", 0, 1)]


def test_its_command_gives_each_slot_its_context_and_applies_no_adapter() -> None:
    files = LlamaFiles(base=Path("b.gguf"), adapters=(Path("a0.gguf"), Path("a1.gguf")), dtype="bfloat16")
    command = LlamaCommand(
        program=Path("llama-server"), files=files, slots=8, context=300, num_threads=2, arguments=("-fa", "on")
    )
    line = command.line(81)
    told = {word: line[line.index(word) + 1] for word in ("--model", "--port", "--parallel", "--ctx-size", "--threads")}
    assert told == {"--model": "b.gguf", "--port": "81", "--parallel": "8", "--ctx-size": "4096", "--threads": "2"}
    assert line[line.index("--lora") + 1] == "a0.gguf,a1.gguf"
    assert line[line.index("--cache-type-k") + 1] == "bf16"
    assert line[-3:] == ["--lora-init-without-apply", "-fa", "on"]
    assert "--lora-init-without-apply" not in replace(command, files=replace(files, adapters=())).line(81)


def test_its_requests_are_waited_for(serve: Callable[[Any], str]) -> None:
    async def metrics(request: web.Request) -> web.Response:
        said = (
            "# TYPE x gauge\nllamacpp:requests_processing 2\nllamacpp:requests_deferred 1\nllamacpp:n_decode_total 9\n"
        )
        return web.Response(text=said)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    running = RunningServer(url=serve(app), start_s=1.0, pid=0)
    assert running.num_running() == 3
    with pytest.raises(RuntimeError, match="still busy"):
        quiet([running], timeout_s=0.1)


PROGRAM = """#!{python}
import http.server, json, os, sys
from pathlib import Path
given = sys.argv[1:]
paths = given[given.index("--lora") + 1].split(",") if "--lora" in given else []
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.say("application/json", json.dumps([{{"id": n, "path": path}} for n, path in enumerate(paths)])
                 if self.path == "/lora-adapters" else "llamacpp:requests_processing 0")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        print(json.dumps(body), flush=True)
        number = body["n_predict"]
        events = [{{"content": " x", "stop": False}}] * number
        events.append({{"content": "", "stop": True, "tokens_predicted": number, "tokens_evaluated": 3}})
        self.say("text/event-stream", "".join("data: " + json.dumps(one) + "\\n\\n" for one in events))
    def say(self, kind, text):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(given[given.index("--port") + 1])), Answer).serve_forever()
"""


def test_it_is_started_with_and_without_adapters_and_warmed(stage: Stage, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    among, names = stage.among("lora:4"), ("a00000", "a00001")
    setting = LlamaSetting(program=program, slots=2, context=9)
    with llama_server(among, names, setting) as contestant:
        assert contestant.name == "llamacpp"
        assert "at its start only" in contestant.cold
        assert "with 2 of them" in contestant.cold
        outcomes = contestant.play(
            among.trace(adapters=names, popularity="distinct", num_requests=4), "four", concurrency=2, limit_s=30.0
        )
        assert [one.error for one in outcomes] == [None] * 4
        assert contestant.peak_mib() > 1
    said = (among.options.folder / "llamacpp.log").read_text()
    bodies = [json.loads(line) for line in said.splitlines()]
    assert [body["lora"][0]["id"] for body in bodies[:2]] == [0, 1], "each adapter is used before the clock starts"
    assert len(bodies) == 6
    assert (among.options.work / "gguf" / "base-tiny-float32.gguf").exists()
    assert (among.options.folder / "llamacpp-base.log").read_text() == ""


def test_files_for_it_are_made_once_and_their_command_is_told(
    tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["make-gguf", "--base", "tiny", "--work", str(tiny_work), "--adapters", "2", "--mixture", "lora:4"]
    assert main(words) == 0
    adapter = tiny_work / "gguf" / "base-tiny-lora4-all-float32" / "a00001.gguf"
    made = adapter.stat().st_mtime_ns
    assert main(words) == 0
    assert adapter.stat().st_mtime_ns == made
    said = capsys.readouterr().out
    assert "3 files" in said
    assert f",{adapter} --lora-init-without-apply" in said
