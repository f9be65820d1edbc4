"""Decode steps that are captured give the tokens of those that are not: for any mix, and whoever comes into a slot.

The graph is a tape (`tape`): what was asked of the device, over the same memory. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from peft_serve.adapters.primitives import Adapter, Affine, BlockDiagonal, Edit, LowRank, Replace, Rows
from peft_serve.core import BASE, AdapterId, Draw, RequestId, Row, SamplingParams, Step
from peft_serve.engine.gpu_terms import other_kernels
from peft_serve.model.arena import Arena
from peft_serve.model.base import ResidentBase
from peft_serve.model.carrier import Carrier
from peft_serve.model.runner import StepRunner
from peft_serve.model.step_graphs import Capturing, Recorder, Replay
from peft_serve.model.terms.term import OtherKernels
from peft_serve.model.wire import wire_to
from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.driver import BLOCK_SIZE, Driver, Job
from tests.model.slow_tiles import SlowTiles
from tests.model.tape import TapeRecorder
from tests.model.tiny_models import causal_sizes, randomised, t5_sizes, tiny

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.attention import TiledAttention
from peft_serve.kernels.triton.attention_tiles import Sizes
from peft_serve.kernels.triton.held import HeldEntries
from peft_serve.kernels.triton.low_rank import LowRankKernel
from peft_serve.model.triton_attention import PlanAttention

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")

CPU = torch.device("cpu")
SIZES = Sizes(split=16, most_splits=4, keys=16, align=16)  # so that short contexts have several parts
Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"
NORM, EMBEDDING, HEAD = "model.layers.0.input_layernorm", "model.embed_tokens", "lm_head"


def llama() -> PreTrainedModel:
    sizes = causal_sizes(num_hidden_layers=1, intermediate_size=48, num_key_value_heads=2)
    return randomised(lambda: LlamaForCausalLM(LlamaConfig(**sizes)), 0)


def t5() -> PreTrainedModel:
    return randomised(
        lambda: T5ForConditionalGeneration(T5Config(**t5_sizes(num_layers=1, num_decoder_layers=1, d_kv=16))), 0
    )


def random_edit(base: ResidentBase, path: str, kind: str, rank: int, make: torch.Generator) -> Edit:
    spec = base.sites[path]

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=make) * 0.4

    if kind == "own":
        return Replace({name: 1 + drawn(*shape) for name, shape in spec.parameters.items()})
    delta = LowRank(drawn(rank, spec.in_features), drawn(spec.out_features, rank)) if kind != "scales" else None
    if kind == "lora":
        return Affine(delta=delta)
    if kind == "rows":
        return Affine(rows=Rows(torch.arange(20, 40), drawn(20, spec.out_features)))
    if kind == "mixed":
        return Affine(in_mix=BlockDiagonal(drawn(spec.in_features // 4, 4, 4)))
    return Affine(
        delta=delta,
        in_scale=1 + drawn(spec.in_features),
        out_scale=1 + drawn(spec.out_features),
        shift=drawn(spec.out_features),
    )


def adapter(base: ResidentBase, name: str, kinds: Mapping[str, str], *, rank: int = 4) -> Adapter:
    """By site, what kind of edit it has there."""
    make = torch.Generator().manual_seed(sum(map(ord, name)))
    sites = {path: random_edit(base, path, kind, rank, make) for path, kind in kinds.items()}
    return Adapter(id=AdapterId(name), method="TEST", sites=sites)


LORA = {Q: "lora", K: "lora", HEAD: "lora"}
SCALES = {K: "scales", DOWN: "all", NORM: "own"}


class Bench:
    """A base with kernels, adapters by name, and a driver that captures."""

    def __init__(
        self,
        make: Callable[[], PreTrainedModel],
        recorder: Recorder | None = None,
        kernel: TiledAttention | None = None,
        others: Callable[[OtherKernels], OtherKernels] = lambda kernels: kernels,
        **more: int,
    ) -> None:
        self.recorder = recorder or TapeRecorder()
        self.base = ResidentBase(make(), name="tiny")
        self.plain = ResidentBase(make(), name="tiny")
        self.kernel = LowRankKernel(CPU, num_slots=4)
        self.base.adapted.run_low_rank_by(self.kernel)
        self.base.adapted.run_others_by(others(other_kernels(self.kernel.memory)))
        attention = PlanAttention(kernel or SlowTiles(SIZES))  # type: ignore[arg-type]
        self.base.runs.attention.whole = attention
        self.outcomes: Counter[str] = Counter()
        self.capturing = Capturing(
            recorder=self.recorder,
            attention=attention,
            tables=HeldEntries(self.kernel, max_rank=32),
            max_rows=8,
            told=lambda outcome: self.outcomes.update([outcome]),
            **{"seen": 1, "rest": 0, **more},
        )
        self.driver = Driver(self.base, capturing=self.capturing)
        assert self.driver.runner.graphs is not None
        self.graphs = self.driver.runner.graphs

    def install(self, *adapters: Adapter) -> None:
        self.driver.adapters |= {each.id: each for each in adapters}
        assert not self.driver.install(*(each.id for each in adapters)).failed_installs

    def put(self, slot: int, it: Adapter, *, instead_of: Adapter | None = None) -> None:
        """Have an adapter in this very slot."""
        self.driver.adapters[it.id] = it
        assert not self.driver.exchange(slot, it.id, is_taken=instead_of is not None).failed_installs

    def answers(self, *names: AdapterId) -> None:
        """Answers for these adapters side by side are those of a base without kernels and graphs.

        A prompt comes before: what sites have made for a graph they have made for another pass since."""
        prompts = [replace(job, prompt=(*job.prompt, 12, 13)) for job in self._jobs(names)]
        self.driver.read(prompts)
        self.driver.give_back(prompts)
        jobs, expected = self._jobs(names), self._jobs(names)
        num_steps = self.outcomes.total()
        self.driver.finish(jobs, max_chunk=1, share=1.0)
        has_source = self.base.shape.is_encoder_decoder  # which is read in the first step
        assert self.outcomes.total() - num_steps == 3 - has_source, "no pass fails and is run again row by row"
        plain = Driver(self.plain, self.driver.adapters)
        if used := sorted(set(names) - {BASE}):
            plain.install(*used)
        plain.finish(expected)
        assert [job.output for job in jobs] == [job.output for job in expected]
        for job, other in zip(jobs, expected, strict=True):
            assert job.logprobs == pytest.approx(other.logprobs, abs=2e-4)
        self.driver.give_back(jobs)
        for each in used:
            self.plain.adapted.remove(plain._resident[each].slot)

    def _jobs(self, names: tuple[AdapterId, ...]) -> list[Job]:
        has_source = self.base.shape.is_encoder_decoder
        return [
            Job(
                prompt=(0, 9, 8)[: 1 + place % 3] if has_source else (7 + place, 30, 11)[: 1 + place % 3],
                source=tuple(range(20, 22 + 5 * place)) if has_source else (),
                num_new=3 - place % 3,  # all are done in the same step
                adapter=name,
            )
            for place, name in enumerate(names)
        ]

    @property
    def num_recorded(self) -> int:
        assert isinstance(self.recorder, TapeRecorder)
        return len(self.recorder.replays)


def test_mixes_and_swaps_of_adapters_are_served_by_what_was_captured_for_others() -> None:
    bench = Bench(llama)
    first, other = adapter(bench.base, "a", LORA), adapter(bench.base, "b", LORA, rank=20)
    scaled = adapter(bench.base, "c", SCALES, rank=9)
    bench.install(first, other, scaled)
    bench.answers(first.id, BASE, scaled.id)
    assert bench.outcomes["captured"] == bench.num_recorded == 1
    assert bench.outcomes["eager"] == 0
    third = adapter(bench.base, "d", LORA, rank=7)
    bench.put(1, third, instead_of=first)
    bench.answers(third.id, BASE, other.id)
    assert bench.num_recorded == 1, "adapters that do no more than others did are served by one graph"
    assert bench.outcomes["replayed"] > 0


def test_tables_that_have_moved_are_not_read_where_they_were() -> None:
    bench = Bench(llama)
    first, second, third = (adapter(bench.base, name, {K: "scales", NORM: "own"}) for name in "abc")
    bench.install(first)
    bench.answers(first.id, BASE, BASE)
    bench.put(20, second)  # tables by slot reached less far: they are elsewhere now
    bench.put(1, third, instead_of=first)
    bench.answers(third.id, BASE, BASE)
    assert bench.num_recorded == 2
    bench.answers(second.id, BASE, BASE)
    assert bench.num_recorded == 3, "a kernel's own table did not reach to that slot"
    assert len(bench.graphs) == 1


def test_norms_with_a_bias_of_their_own_are_another_kind_than_those_without() -> None:
    bench = Bench(lambda: tiny("gpt2"))
    path, make = "transformer.h.0.ln_1", torch.Generator().manual_seed(1)
    scale, both = (
        {name: 1 + torch.randn(bench.base.sites[path].out_features, generator=make) for name in names}
        for names in (("weight",), ("weight", "bias"))
    )
    first, other = (
        Adapter(id=AdapterId(name), method="TEST", sites={path: Replace(state)})
        for name, state in (("a", scale), ("b", both))
    )
    bench.install(first, other)
    bench.answers(first.id, BASE)
    bench.answers(other.id, BASE)
    assert bench.num_recorded == 2
    assert bench.outcomes["eager"] == 0


def test_adapters_on_their_way_are_waited_for_before_a_replay() -> None:
    bench = Bench(llama)
    order: list[str] = []
    bench.graphs._settle = lambda: order.append("settled")
    bench.answers(BASE, BASE, BASE)
    assert len(order) == bench.outcomes["captured"] + bench.outcomes["replayed"] > 1


def test_in_an_arena_rows_without_a_request_write_to_its_last_block() -> None:
    bench = Bench(llama)
    cache, num_parts = bench.base.runs.cache, 2 * bench.base.runs.cache.num_layers
    part_bytes = cache.bytes_per_block(BLOCK_SIZE, torch.float32) // num_parts
    arena = Arena(num_blocks=9, num_parts=num_parts, part_bytes=part_bytes, device=CPU)
    own = StepRunner(
        bench.base,
        num_blocks=8,
        num_cross_blocks=0,
        block_size=BLOCK_SIZE,
        adapters=bench.driver.adapters.__getitem__,
        carrier=Carrier(arena, wire_to(CPU, pinned_bytes=0, say=str), order=()),
        capturing=bench.capturing,
    )
    draw = Draw(params=SamplingParams(), seed=0, index=0)
    found = []
    for runner, spacing in ((own, num_parts), (bench.driver.runner, 1)):
        tokens = [7, 8, 9]
        for start in range(6):
            rows = tuple(
                Row(
                    request=RequestId(str(i)),
                    slot=0,
                    tokens=(tokens[i],),
                    start=start,
                    blocks=(spacing * (1 + i), spacing * (4 + i)),
                    draw=draw,
                )
                for i in range(3)
            )
            tokens = [result.token or 0 for result in runner.run(Step(id=start, rows=rows)).rows]
            runner.check()
        found.append(tokens)
    assert found[0] == found[1]
    assert arena.stretch(8 * num_parts, 1).any(), "a fourth row was idle"
    assert not arena.stretch(7 * num_parts, 1).any(), "a block that nobody has"


def test_factors_at_an_embedding_are_found_by_slot_and_id() -> None:
    bench = Bench(llama)
    first, other = adapter(bench.base, "a", {EMBEDDING: "lora"}), adapter(bench.base, "b", {EMBEDDING: "lora"}, rank=20)
    vectors = adapter(bench.base, "c", {EMBEDDING: "all", Q: "lora"}, rank=3)
    bench.install(first, other, vectors)
    bench.answers(first.id, BASE, other.id)
    third = adapter(bench.base, "d", {EMBEDDING: "lora"}, rank=7)
    bench.put(1, third, instead_of=first)
    bench.answers(other.id, third.id, third.id)
    assert bench.num_recorded == 1
    bench.answers(third.id, BASE, vectors.id)
    assert bench.outcomes["eager"] == 0


def test_the_attention_kernel_reads_what_stands_in_tables_of_another_step() -> None:
    bench = Bench(llama, kernel=TiledAttention(SIZES))
    bench.answers(BASE)
    assert bench.num_recorded == 1
    bench.answers(BASE)
    assert bench.num_recorded == 1


def test_cross_attention_is_captured_too() -> None:
    bench = Bench(t5)
    site = "decoder.block.0.layer.0.SelfAttention.q"
    own = adapter(bench.base, "a", {site: "lora"})
    bench.install(own)
    bench.answers(BASE, own.id, BASE)
    assert bench.num_recorded > 0
    assert bench.outcomes["replayed"] > 0


class Short(TapeRecorder):
    """Runs out of memory at first."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error: Exception | None = error

    def record(self, act: Callable[[], None]) -> Replay:  # type: ignore[override]
        error, self._error = self._error, None
        if error is not None:
            raise error
        return super().record(act)


def test_without_memory_for_a_graph_the_step_runs_and_no_other_is_tried_for_a_while() -> None:
    bench = Bench(llama, Short(torch.OutOfMemoryError("no memory")))
    bench.answers(BASE, BASE, BASE)
    assert bench.num_recorded == 0
    assert bench.outcomes["eager"] == sum(bench.outcomes.values())
    bench.graphs._num_rest = 0
    bench.answers(BASE, BASE, BASE)
    assert bench.num_recorded > 0


def test_the_base_is_captured_at_start_or_the_reason_is_told() -> None:
    bench = Bench(llama)
    assert bench.graphs.warm_up(until=lambda: bench.num_recorded == 1) is None
    assert len(bench.graphs) == 1
    bench.answers(*[BASE] * 7)
    assert bench.outcomes["captured"] == 0
    broken = Bench(llama, Short(RuntimeError("operation not permitted when stream is capturing")))
    assert broken.graphs.warm_up() == "RuntimeError: operation not permitted when stream is capturing"


def test_graphs_that_cost_too_much_leave_the_longest_unused_first() -> None:
    bench = Bench(llama, TapeRecorder(num_bytes=40), max_bytes=100)
    for num_rows in (1, 2, 3, 1, 2):
        bench.answers(*[BASE] * num_rows)
    assert len(bench.graphs) == 2
    assert bench.num_recorded == 5, "the graph of one row had to leave for that of four, and so on"


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "gpt_neox"])
def test_families_ask_nothing_of_the_host_in_a_decode_step(family: str) -> None:
    bench = Bench(lambda: tiny(family))
    assert bench.graphs.warm_up(until=lambda: bench.num_recorded == 1) is None
