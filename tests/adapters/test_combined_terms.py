"""Combined adapters compute what peft computes for the same combination, or are refused with a reason."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peft_serve.adapters.combined import Part, combined_id
from peft_serve.adapters.combining import combine, for_task, load_combined
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    ExpertFactors,
    Experts,
    Head,
    HeadTask,
    Kronecker,
    KVPrefix,
    LowRank,
    Replace,
    Rows,
    SoftPrompt,
    Sparse,
)
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.shared_primitives import Rescaled, SharedBases
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.core import AdapterId
from peft_serve.errors import InvalidParameter
from tests.adapters.checkpoints import VOCAB, make_base, make_checkpoint
from tests.adapters.fake_base import FakeBase, adapted_logits, dense_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own

TOLERANCE = 1e-5
ID = AdapterId("combined")


@cache
def base_of(kind: str) -> FakeBase:
    return FakeBase(make_base(kind))


def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(5))


def compiled(files: CheckpointFiles, base: FakeBase) -> Adapter:
    return compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())


def logits(base: FakeBase, adapter: Adapter) -> torch.Tensor:
    return adapted_logits(base, adapter, ids(), ids())


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())


def saved(oracle: peft.PeftModel, folder: Path) -> Path:
    oracle.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (1.5, -0.5)])
def test_a_weighted_sum_of_loras_is_pefts_cat(kind: str, weights: tuple[float, float], tmp_path: Path) -> None:
    base = base_of(kind)
    made = [make_checkpoint("lora", kind, seed=seed) for seed in (1, 2)]
    model = peft.PeftModel.from_pretrained(make_base(kind), saved(made[0][1], tmp_path / "a"), adapter_name="a")
    model.load_adapter(saved(made[1][1], tmp_path / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], list(weights), "ab", combination_type="cat")
    model.set_adapter("ab")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids()).logits
    got = combine([(compiled(files, base), weight) for (files, _), weight in zip(made, weights, strict=True)], ID)
    assert close(logits(base, got), expected)
    alone = logits(base, compiled(made[0][0], base))
    assert not close(alone, expected), "the second part must matter"


def test_scales_multiply_as_pefts_active_ia3_do(tmp_path: Path) -> None:
    base = base_of("llama")
    made = [make_checkpoint("ia3", "llama", seed=seed) for seed in (1, 2)]
    model = peft.PeftModel.from_pretrained(make_base("llama"), saved(made[0][1], tmp_path / "a"), adapter_name="a")
    model.load_adapter(saved(made[1][1], tmp_path / "b"), adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids()).logits
    first, second = (compiled(files, base) for files, _ in made)
    assert close(logits(base, combine([(first, 1.0), (second, 1.0)], ID)), expected)
    assert close(logits(base, combine([(second, 1.0), (first, 1.0)], ID)), expected)


def test_a_soft_prompt_stands_in_front_of_a_tuned_model(tmp_path: Path) -> None:
    base = base_of("llama")
    lora_files, lora = make_checkpoint("lora", "llama", seed=1)
    prompt_files, prompt = make_checkpoint("prompt_tuning", "llama", seed=2)
    merged = copy.deepcopy(lora).merge_and_unload()
    model = peft.PeftModel.from_pretrained(merged, saved(prompt, tmp_path)).eval()
    with torch.no_grad():
        expected = model(input_ids=ids()).logits[:, -ids().shape[1] :]
    parts = [(compiled(prompt_files, base), 1.0), (compiled(lora_files, base), 1.0)]
    assert close(logits(base, combine(parts, ID)), expected)
    assert close(logits(base, combine(parts[::-1], ID)), expected)


def test_a_tuned_norm_beside_a_lora(tmp_path: Path) -> None:
    base = base_of("llama")
    lora_files, _ = make_checkpoint("lora", "llama", seed=1)
    norm_files, norms = make_checkpoint("ln_tuning", "llama", seed=2)
    merged = copy.deepcopy(norms).merge_and_unload()
    _, lora = make_checkpoint("lora", "llama", seed=1)
    model = peft.PeftModel.from_pretrained(merged, saved(lora, tmp_path)).eval()
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
    got = combine([(compiled(lora_files, base), 1.0), (compiled(norm_files, base), 1.0)], ID)
    assert close(logits(base, got), expected)


def test_prompts_and_prefixes_stand_in_the_order_named() -> None:
    one, two = torch.ones(2, 4), torch.full((3, 4), 2.0)
    made = combine([(_adapter(prompt=SoftPrompt(two)), 1.0), (_adapter(prompt=SoftPrompt(one)), 1.0)], ID)
    assert made.prompt is not None
    assert torch.equal(made.prompt.embeddings_PD, torch.cat([two, one]))
    first, second = (
        KVPrefix(torch.full((2, 1, n, 4), v), torch.full((2, 1, n, 4), -v)) for n, v in ((2, 1.0), (3, 2.0))
    )
    both = combine([(_adapter(prefix=first), 1.0), (_adapter(prefix=second, prompt=SoftPrompt(one)), 1.0)], ID)
    assert both.prefix is not None
    assert both.prefix.keys_LHPD.shape == (2, 1, 5, 4)
    assert both.prefix.keys_LHPD[0, 0, :, 0].tolist() == [1, 1, 2, 2, 2]
    assert both.prefix.values_LHPD[0, 0, :, 0].tolist() == [-1, -1, -2, -2, -2]
    assert both.footprint(is_encoder_decoder=False).num_prefix_tokens == 7


def test_every_map_takes_a_weight_and_keeps_its_place() -> None:
    base = base_of("llama")
    path = "model.layers.0.self_attn.q_proj"
    spec = base.sites[path]
    o, i = spec.out_features, spec.in_features
    maps = (
        Dense(torch.randn(o, i)),
        Kronecker(torch.randn(4, 4), torch.randn(o // 4, i // 4)),
        Sparse(torch.tensor([0, 3]), torch.tensor([1, 2]), torch.randn(2)),
        Rescaled("k", torch.randn(2, i), torch.randn(o, 2), torch.randn(2), torch.randn(o)),
        SharedBases("b", torch.randn(2, i), torch.randn(o, 7), torch.randn(2, 3), torch.randn(3, i), False),
        Circulant(torch.randn(o // 4, i // 4, 4)),
        Spectrum(torch.tensor([0, 3]), torch.tensor([1, 2]), torch.randn(2)),
    )
    adapter = _adapter(path, Affine(maps=maps, shift=torch.randn(o)))
    half = combine([(adapter, 0.5)], ID).sites[path]
    assert isinstance(half, Affine)
    for mine, other in zip(half.maps, maps, strict=True):
        assert torch.allclose(dense_of(mine, spec), 0.5 * dense_of(other, spec), atol=1e-6)
    twice = combine([(adapter, 0.5), (adapter, 1.5)], ID).sites[path]
    assert isinstance(twice, Affine)
    edit = adapter.sites[path]
    assert isinstance(edit, Affine)
    assert edit.shift is not None
    assert twice.shift is not None
    assert torch.allclose(twice.shift, 2 * edit.shift)
    total = sum(dense_of(each, spec) for each in twice.maps)
    assert torch.allclose(torch.as_tensor(total), 2 * sum(dense_of(each, spec) for each in maps), atol=1e-5)


def test_experts_concatenate_by_name() -> None:
    def factors(rank: int) -> ExpertFactors:
        return ExpertFactors(torch.randn(3, rank, 5), torch.randn(3, 7, rank))

    a, b, c = factors(2), factors(4), factors(1)
    made = combine([(_adapter("e", Experts({"up": a})), 2.0), (_adapter("e", Experts({"up": b, "down": c})), 1.0)], ID)
    edit = made.sites["e"]
    assert isinstance(edit, Experts)
    up = edit.factors["up"]
    expected = 2 * a.b_EOR @ a.a_ERI + b.b_EOR @ b.a_ERI
    assert torch.allclose(up.b_EOR @ up.a_ERI, expected, atol=1e-5)
    assert edit.factors["down"].a_ERI.shape == (3, 1, 5)


def _adapter(path: str = "", edit: Edit | None = None, **fields: Any) -> Adapter:
    return Adapter(id=AdapterId("x"), method="X", sites={} if edit is None else {path: edit}, **fields)


ROTATED = Affine(in_mix=BlockDiagonal(torch.eye(2)[None]))
DORA = Affine(out_scale=torch.ones(4), delta=LowRank(torch.ones(1, 4), torch.ones(4, 1)))
SCALED = Affine(out_scale=torch.ones(4))
HEAD = Head(HeadTask.SEQUENCE, {"score.weight": torch.ones(2, 4)})
STILL = KVPrefix(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), advances_positions=False)
BARE = SoftPrompt(torch.ones(1, 4), is_bare=True)
NORM = Replace({"weight": torch.ones(4)})

REFUSED: list[tuple[Adapter, Adapter, str]] = [
    (_adapter("p", ROTATED), _adapter("p", ROTATED), "goes into p"),
    (_adapter("p", ROTATED), _adapter("p", Affine(in_scale=torch.ones(4))), "goes into p"),
    (_adapter("p", DORA), _adapter("p", DORA), "comes out of p"),
    (_adapter("p", DORA), _adapter("p", SCALED), "comes out of p"),
    (_adapter("p", NORM), _adapter("p", Replace({"weight": torch.zeros(4)})), "weight of their own for p"),
    (_adapter("p", NORM), _adapter("p", SCALED), "act on p"),
    (_adapter(head=HEAD), _adapter(head=HEAD), "task head"),
    (_adapter(start=(3, 4)), _adapter("p", SCALED), "aLoRA"),
    (_adapter(prefix=STILL), _adapter(prompt=SoftPrompt(torch.ones(1, 4))), "takes no positions"),
    (_adapter(prefix=STILL), _adapter(prefix=replace(STILL, advances_positions=True)), "beside one that does"),
    (_adapter(prefix=STILL), _adapter(prefix=replace(STILL, absent=frozenset({0}))), "leave out different layers"),
    (_adapter(prompt=BARE), _adapter(prompt=replace(BARE, is_bare=False)), "beside one with positions"),
    (
        _adapter("p", Affine(rows=Rows(torch.tensor([1, 2]), torch.ones(2, 4)))),
        _adapter("p", Affine(rows=Rows(torch.tensor([2]), torch.ones(1, 4)))),
        "one token of p",
    ),
]


@pytest.mark.parametrize(("first", "second", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_what_two_cannot_share_is_refused_in_either_order(first: Adapter, second: Adapter, reason: str) -> None:
    for parts in ([first, second], [second, first]):
        with pytest.raises(InvalidParameter, match=reason):
            combine([(part, 1.0) for part in parts], ID)


FITTING: list[tuple[Edit, Edit]] = [
    (NORM, Replace({"weight": torch.ones(4)})),
    (NORM, Replace({"bias": torch.ones(4)})),
    (DORA, Affine(delta=LowRank(torch.ones(2, 4), torch.ones(4, 2)))),
    (ROTATED, Affine(out_scale=torch.ones(4), shift=torch.ones(4))),
    (
        Affine(rows=Rows(torch.tensor([1]), torch.ones(1, 4))),
        Affine(rows=Rows(torch.tensor([2]), torch.ones(1, 4)), delta=LowRank(torch.ones(1, 9), torch.ones(4, 1))),
    ),
]


@pytest.mark.parametrize(("first", "second"), FITTING)
def test_what_two_can_share_keeps_every_term(first: Edit, second: Edit) -> None:
    edit = combine([(_adapter("p", first), 1.0), (_adapter("p", second), 1.0)], ID).sites["p"]
    assert type(edit) is type(first)
    if isinstance(edit, Affine):
        for name in ("rows", "in_mix", "out_scale", "delta", "shift"):
            given = [getattr(each, name) for each in (first, second)]
            assert (getattr(edit, name) is None) == all(each is None for each in given)
    else:
        assert isinstance(edit, Replace)
        assert isinstance(first, Replace)
        assert isinstance(second, Replace)
        assert edit.state.keys() == first.state.keys() | second.state.keys()


@pytest.mark.parametrize(
    "adapter",
    [
        _adapter("p", SCALED),
        _adapter("p", ROTATED),
        _adapter("p", NORM),
        _adapter("p", Affine(rows=Rows(torch.tensor([1]), torch.ones(1, 4)))),
        _adapter(prompt=SoftPrompt(torch.ones(1, 4))),
        _adapter(prefix=STILL),
        _adapter(head=HEAD),
    ],
)
def test_what_is_no_sum_takes_no_weight(adapter: Adapter) -> None:
    with pytest.raises(InvalidParameter, match="leave the weight out"):
        combine([(adapter, 0.5)], ID)
    assert combine([(adapter, 1.0)], ID).sites == adapter.sites


def _load(base: FakeBase, files: dict[AdapterId, CheckpointFiles], adapter: AdapterId, **limits: Any) -> Adapter:
    bounds = GateLimits(**limits)

    def load_part(part: AdapterId, task: int | None) -> Adapter:
        return compile_adapter(for_task(inspect(files[part], base, GateLimits()), task), base, GateLimits())

    return load_combined(adapter, load_part, base, bounds)


def test_loading_an_id_loads_its_parts_and_holds_them_to_the_limits() -> None:
    base = base_of("llama")
    made = [make_checkpoint("lora", "llama", seed=seed)[0] for seed in (1, 2)]
    files = {each.digest(): each for each in made}
    a, b = files
    both = combined_id([Part(id=a, weight=0.5), Part(id=b)])
    adapter = _load(base, files, both)
    assert adapter.id == both
    assert close(
        logits(base, adapter),
        logits(base, combine([(compiled(made[0], base), 0.5), (compiled(made[1], base), 1.0)], ID)),
    )
    assert _load(base, files, a).id == a
    rank = adapter.max_rank
    with pytest.raises(InvalidParameter, match=f"rank {rank} together"):
        _load(base, files, both, max_rank=rank - 1)
    with pytest.raises(InvalidParameter, match="bytes together"):
        _load(base, files, both, max_adapter_bytes=100)
    huge = combined_id([Part(id=a, weight=100.0)])
    assert _load(base, files, huge).id == huge


def test_virtual_tokens_together_have_a_limit() -> None:
    base = base_of("llama")
    made = [make_checkpoint("prompt_tuning", "llama", seed=seed)[0] for seed in (1, 2)]
    files = {each.digest(): each for each in made}
    num = json.loads(made[0].config)["num_virtual_tokens"]
    both = combined_id([Part(id=each) for each in files])
    assert _load(base, files, both, max_virtual_tokens=2 * num).prompt is not None
    with pytest.raises(InvalidParameter, match="virtual tokens together"):
        _load(base, files, both, max_virtual_tokens=2 * num - 1)


def test_a_task_of_a_checkpoint_that_holds_several_is_pefts(tmp_path: Path) -> None:
    base = base_of("llama")
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_tasks=3, num_virtual_tokens=4, num_ranks=2, tokenizer_name_or_path=None
    )
    torch.manual_seed(3)
    oracle = peft.get_peft_model(make_base("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "prefix_task" in name:
                parameter.normal_()
    folder = saved(oracle, tmp_path)
    files = CheckpointFiles(
        config=(folder / "adapter_config.json").read_bytes(),
        weights=(folder / "adapter_model.safetensors").read_bytes(),
    )
    inspected = inspect(files, base, GateLimits())
    assert inspected.summary.num_tasks == 3
    seen = []
    for task in range(3):
        with torch.no_grad():
            expected = oracle(input_ids=ids(), task_ids=torch.tensor([task])).logits[:, -ids().shape[1] :]
        got = _load(base, {files.digest(): files}, combined_id([Part(id=files.digest(), task=task)]))
        assert close(logits(base, got), expected)
        seen.append(expected)
    assert not close(seen[0], seen[1])
