"""Adapters at the sites of tiny transformers models, against hand formulas on a model of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_serve.adapters.base import HAS_WEIGHT, SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Affine, Edit, LowRank, Replace
from peft_serve.core import AdapterId
from peft_serve.kernels.grouped import cost_masked, cost_runs
from peft_serve.model import sites as site_module
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites

VOCAB = 61


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            tie_word_embeddings=True,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64))


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )


def gemma2() -> nn.Module:
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=VOCAB,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB)
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "opt": opt,
    "gemma2": gemma2,
    "t5": t5,
}


def stream_of(path: str) -> Stream:
    if path == "lm_head":
        return Stream.HEAD
    is_cross = "EncDecAttention.k" in path or "EncDecAttention.v" in path
    return Stream.SOURCE if path.startswith("encoder.") or is_cross else Stream.TARGET


def build(family: str) -> nn.Module:
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert name
    return model


# --- adapters ---------------------------------------------------------------------------------------------


def low_rank(spec: SiteSpec, rank: int, rng: torch.Generator) -> LowRank:
    a = torch.randn(rank, spec.in_features, generator=rng) * 0.3
    return LowRank(a, torch.randn(spec.out_features, rank, generator=rng) * 0.3)


def around_one(size: int, rng: torch.Generator) -> Tensor:
    return 1 + 0.3 * torch.randn(size, generator=rng)


def edit_of(kind: str, spec: SiteSpec, rank: int, rng: torch.Generator) -> Edit | None:
    if kind in ("norm", "all") and spec.kind is SiteKind.NORM:
        return Replace({n: around_one(shape[0], rng) for n, shape in spec.parameters.items()})
    if spec.kind is SiteKind.NORM or spec.kind not in HAS_WEIGHT or kind == "norm":
        return None
    if kind == "lora":
        return Affine(delta=low_rank(spec, rank, rng))
    if kind == "scales":
        return Affine(
            in_scale=around_one(spec.in_features, rng),
            out_scale=around_one(spec.out_features, rng),
            shift=torch.randn(spec.out_features, generator=rng) * 0.1,
        )
    if kind == "own":
        return Replace({n: torch.randn(shape, generator=rng) * 0.2 for n, shape in spec.parameters.items()})
    assert kind == "all"
    return Affine(
        delta=low_rank(spec, rank, rng),
        in_scale=around_one(spec.in_features, rng),
        out_scale=around_one(spec.out_features, rng),
        shift=torch.randn(spec.out_features, generator=rng) * 0.1,
    )


def is_token_site(path: str) -> bool:
    """Relative position tables see buckets, not tokens."""
    return "relative_attention_bias" not in path


def adapter(
    specs: Mapping[str, SiteSpec], kind: str, seed: int, *, rank: int = 4, every: int = 1, head: bool = True
) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    edits: dict[str, Edit] = {}
    for place, (path, spec) in enumerate(specs.items()):
        if not is_token_site(path) or (place + seed) % every or (path == "lm_head" and not head):
            continue
        edit = edit_of(kind, spec, rank, rng)
        if edit is not None:
            edits[path] = edit
    return Adapter(id=AdapterId(f"sha256:{seed:064x}"), method="TEST", sites=edits)


# --- the truth: one adapter, one model of its own ---------------------------------------------------------


def alone(model: nn.Module, specs: Mapping[str, SiteSpec], worn: Adapter | None) -> nn.Module:
    """A copy of the plain model that computes the adapter's formulas in its own forwards."""
    own = copy.deepcopy(model)
    if worn is None:
        return own
    modules = dict(own.named_modules())
    for path, edit in worn.sites.items():
        module = modules[path]
        if isinstance(edit, Replace):
            for name, value in edit.state.items():
                setattr(module, name, nn.Parameter(value.clone()))  # tied weights part here
        else:
            module.register_forward_hook(_formula(specs[path], edit))
            if edit.in_scale is not None and specs[path].kind is not SiteKind.EMBEDDING:
                scale = edit.in_scale
                module.register_forward_pre_hook(lambda _, args, s=scale: (args[0] * s,), prepend=True)
    return own


def _formula(spec: SiteSpec, edit: Affine) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        x = args[0]
        is_lookup = spec.kind is SiteKind.EMBEDDING
        if edit.in_scale is not None:
            if is_lookup:
                y = y * edit.in_scale[x].unsqueeze(-1)
            else:
                x = x / edit.in_scale  # the hook sees the scaled input, the delta reads the raw one
        if edit.out_scale is not None:
            y = y * edit.out_scale
        if edit.delta is not None:
            u = edit.delta.a_RI.T[x] if is_lookup else x @ edit.delta.a_RI.T
            y = y + u @ edit.delta.b_OR.T
        return y if edit.shift is None else y + edit.shift

    return hook


Row = tuple[int, list[int]]


def call(model: nn.Module, ids: list[int], positions: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits [T, V] of a decoder-only model on flattened tokens."""
    kwargs = {} if mask is None else {"attention_mask": mask}
    out = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False, **kwargs)
    return out.logits[0]


def block_causal(lengths: Sequence[int]) -> Tensor:
    """Rows side by side in one sequence, each reading itself only: [1, 1, T, T], additive."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (row[:, None] == row[None]) & torch.ones(len(row), len(row)).tril().bool()
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]


def runs_of(rows: Sequence[Row]) -> list[tuple[int, int]]:
    runs: dict[int, int] = {}
    for slot, ids in rows:
        runs[slot] = runs.get(slot, 0) + len(ids)
    return list(runs.items())


def mixed(model: nn.Module, sites: AdaptedSites, rows: Sequence[Row]) -> list[Tensor]:
    """All rows in one pass of a decoder-only model; logits of each."""
    runs = runs_of(rows)
    for stream in (Stream.TARGET, Stream.HEAD):
        sites.route(stream, runs)
    lengths = [len(ids) for _, ids in rows]
    with torch.inference_mode():
        logits = call(
            model,
            [i for _, ids in rows for i in ids],
            [p for n in lengths for p in range(n)],
            block_causal(lengths),
        )
    sites.clear()
    return list(logits.split(lengths))


def rows_for(slots: Sequence[int], seed: int, lengths: Sequence[int] = (3, 1, 7)) -> list[Row]:
    rng = torch.Generator().manual_seed(seed)
    return [
        (slot, torch.randint(0, VOCAB, (lengths[k % len(lengths)],), generator=rng).tolist())
        for k, slot in enumerate(sorted(slots))
    ]


def assert_rows_alone(
    model: nn.Module, plain: nn.Module, sites: AdaptedSites, worn: Mapping[int, Adapter], rows: Sequence[Row]
) -> None:
    """What every row gets in the batch is what it gets on a model of its own."""
    for (slot, ids), logits in zip(rows, mixed(model, sites, rows), strict=True):
        with torch.inference_mode():
            own = call(alone(plain, sites.specs, worn.get(slot)), ids, list(range(len(ids))))
        scale = float(own.abs().max())
        torch.testing.assert_close(logits, own, rtol=0, atol=2e-5 * scale, msg=lambda m, s=slot: f"slot {s}: {m}")


DECODERS = ["llama", "gpt2", "opt", "gemma2"]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["lora", "scales", "own", "norm", "all"])
def test_one_kind(family: str, kind: str) -> None:
    plain = build(family)
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    worn = {slot: adapter(sites.specs, kind, slot, rank=2 * slot) for slot in (1, 2, 5)}
    for slot, it in worn.items():
        sites.install(slot, it)
    assert_rows_alone(model, plain, sites, worn, rows_for([0, 0, 1, 2, 2, 5], seed=1))


@pytest.mark.parametrize("family", DECODERS)
def test_every_kind_in_one_batch(family: str) -> None:
    plain = build(family)
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    kinds = ["lora", "scales", "own", "norm", "all", "lora", "all"]
    worn = {slot: adapter(sites.specs, kind, slot, rank=slot, every=1 + slot % 3) for slot, kind in enumerate(kinds, 1)}
    for slot, it in worn.items():
        sites.install(slot, it)
    assert_rows_alone(model, plain, sites, worn, rows_for(range(8), seed=2))
    assert_rows_alone(model, plain, sites, worn, rows_for([1, 1, 5, 7], seed=3, lengths=(1,)))


def test_long_rows_go_adapter_by_adapter() -> None:
    plain = build("llama")
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    worn = {slot: adapter(sites.specs, "lora", slot, rank=32) for slot in (1, 2, 3)}
    for slot, it in worn.items():
        sites.install(slot, it)
    pieces = [(120 * k, 120 * k + 120, 32 * k, 32 * k + 32) for k in range(3)]
    assert cost_runs(pieces, 64) < cost_masked(480, 96, 64), "the rows below are long enough"
    assert_rows_alone(model, plain, sites, worn, rows_for([0, 1, 2, 3], seed=5, lengths=(120,)))


# --- encoder-decoder --------------------------------------------------------------------------------------


def t5_logits(model: nn.Module, source: list[int], target: list[int]) -> Tensor:
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]), use_cache=False)
    return out.logits[0]


@pytest.mark.parametrize("kind", ["lora", "scales", "own", "norm", "all"])
def test_t5_streams(kind: str) -> None:
    """Encoder, decoder and head see different numbers of tokens; each site follows its own."""
    plain = build("t5")
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    worn = adapter(sites.specs, kind, 3)
    sites.install(2, worn)
    source, target = [5, 6, 7, 8, 9], [0, 11, 12]
    sites.route(Stream.SOURCE, [(2, 5)])
    sites.route(Stream.TARGET, [(2, 3)])
    sites.route(Stream.HEAD, [(2, 3)])
    got = t5_logits(model, source, target)
    want = t5_logits(alone(plain, sites.specs, worn), source, target)
    torch.testing.assert_close(got, want, rtol=0, atol=4e-5 * float(want.abs().max()))
    sites.clear()
    assert torch.equal(t5_logits(model, source, target), t5_logits(plain, source, target))


def test_a_table_that_sees_no_tokens_refuses() -> None:
    model = build("t5")
    sites = AdaptedSites(model, stream_of=stream_of)
    path = next(p for p in sites.specs if "encoder" in p and not is_token_site(p))
    edit = Affine(delta=low_rank(sites.specs[path], 2, torch.Generator()))
    sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST", sites={path: edit}))
    sites.route(Stream.SOURCE, [(1, 5)])
    with pytest.raises(ValueError, match=f"site '{path}' got 25 tokens"):
        t5_logits(model, [5, 6, 7, 8, 9], [0])


# --- the base is the base ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_base_only_is_the_plain_model_bit_for_bit(family: str) -> None:
    plain = build(family)
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    sites.install(1, adapter(sites.specs, "all", 1))
    ids, positions = [4, 5, 6, 7], [0, 1, 2, 3]
    with torch.inference_mode():
        want = call(plain, ids, positions)
        assert torch.equal(call(model, ids, positions), want)
        sites.route(Stream.TARGET, [(0, 4)])
        sites.route(Stream.HEAD, [(0, 4)])
        assert torch.equal(call(model, ids, positions), want)
        sites.route(Stream.TARGET, [(0, 1), (1, 3)])
        assert not torch.equal(call(model, ids, positions), want)
        sites.clear()
        assert torch.equal(call(model, ids, positions), want)


def test_the_tree_and_its_parameters_stay() -> None:
    plain = build("llama")
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    sites.install(1, adapter(sites.specs, "all", 1))
    mixed(model, sites, rows_for([0, 1], seed=1))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("forward" in module.__dict__ for module in model.modules())
    sites.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    ids = [1, 2, 3]
    assert torch.equal(call(model, ids, [0, 1, 2]), call(plain, ids, [0, 1, 2]))


def test_specs() -> None:
    specs = AdaptedSites(build("gpt2"), stream_of=stream_of).specs
    attention = specs["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.in_features, attention.out_features) == (SiteKind.CONV1D, 32, 96)
    assert specs["transformer.wte"].kind is SiteKind.EMBEDDING
    assert specs["transformer.ln_f"].parameters == {"weight": (32,), "bias": (32,)}
    assert next(iter(specs)) == "transformer.wte"
    assert [path for path, spec in specs.items() if spec.kind in HAS_WEIGHT][-1] == "lm_head"
    gemma = AdaptedSites(build("gemma2"), stream_of=stream_of).specs
    assert gemma["model.embed_tokens"].embed_scale == pytest.approx(32**0.5)
    assert "model.decoder.embed_positions" not in AdaptedSites(build("opt"), stream_of=stream_of).specs


class Twofold(nn.Module):
    """One Linear under two paths that see different streams."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Linear(4, 4)
        self.far = self.near


def test_a_module_of_two_streams_follows_the_last_one_routed() -> None:
    model = Twofold()
    sites = AdaptedSites(model, stream_of=lambda path: Stream.SOURCE if path == "far" else Stream.TARGET)
    assert list(sites.specs) == ["near", "far"]
    edit = Affine(shift=torch.ones(4))
    sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST", sites={"far": edit}))
    x = torch.randn(1, 3, 4)
    with torch.inference_mode():
        want = torch.nn.functional.linear(x, model.near.weight, model.near.bias)
        sites.route(Stream.SOURCE, [(0, 2), (1, 1)])
        torch.testing.assert_close(model.near(x) - want, torch.tensor([0.0, 0, 1])[None, :, None].expand(1, 3, 4))
        sites.route(Stream.TARGET, [(1, 3)])
        torch.testing.assert_close(model.near(x) - want, torch.ones(1, 3, 4))
        with pytest.raises(ValueError, match="got 2 tokens"):
            model.near(x[:, :2])
    both = Adapter(id=AdapterId("sha256:1"), method="TEST", sites={"near": edit, "far": edit})
    with pytest.raises(ValueError, match="another path"):
        sites.install(2, both)


# --- churn ------------------------------------------------------------------------------------------------


def test_churn() -> None:
    """Adapters come and go through few slots, far beyond the stacks' first size; no row ever sees a ghost."""
    plain = build("llama")
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    rng = torch.Generator().manual_seed(9)
    worn: dict[int, Adapter] = {}

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=rng))

    for turn in range(40):
        slot = 1 + pick(7)
        if slot in worn:
            sites.remove(slot)
            del worn[slot]
        kind = ("lora", "lora", "all", "scales", "own")[pick(5)]
        worn[slot] = adapter(sites.specs, kind, 100 + turn, rank=1 + pick(24), every=1 + pick(4))
        sites.install(slot, worn[slot])
        sites.check()
        active = sorted({0, slot, *(s for s in worn if pick(2))})
        rows = rows_for(active, seed=turn, lengths=(1 + pick(3), 1, 2))
        assert_rows_alone(model, plain, sites, worn, rows)
        sites.check()


def test_streams_of_different_adapters_do_not_evict_each_other() -> None:
    """Routes of two streams are both in force: the rows of neither may be given away by the other."""
    plain = build("llama")
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    worn = {slot: adapter(sites.specs, "lora", slot, rank=20) for slot in (1, 2, 3)}
    for slot, it in worn.items():
        sites.install(slot, it)
    rows: list[Row] = [(1, [3, 4, 5])]
    for other in (2, 3, 2):
        sites.route(Stream.TARGET, [(1, 3)])
        sites.route(Stream.SOURCE, [(other, 2)])
        sites.route(Stream.HEAD, [(other, 3)])
        sites.route(Stream.HEAD, [(1, 3)])
        with torch.inference_mode():
            got = call(model, rows[0][1], [0, 1, 2])
            want = call(alone(plain, sites.specs, worn[1]), rows[0][1], [0, 1, 2])
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
        sites.clear()
        assert_rows_alone(model, plain, sites, worn, rows_for([other, 3], seed=other))


# --- refusals ---------------------------------------------------------------------------------------------


def test_what_is_refused_leaves_nothing_behind() -> None:
    plain = build("llama")
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    good = adapter(sites.specs, "lora", 1)
    q, norm = "model.layers.0.self_attn.q_proj", "model.norm"
    nan = LowRank(torch.full((2, 32), float("nan")), torch.zeros(32, 2))
    bad: list[tuple[Mapping[str, Edit], str]] = [
        ({"model.layers.9.q": Affine()}, "no site"),
        ({**good.sites, q: Affine(out_scale=torch.ones(31))}, "out_scale has shape"),
        ({**good.sites, q: Affine(delta=LowRank(torch.ones(2, 32), torch.ones(32, 3)))}, "delta.b has shape"),
        ({**good.sites, q: Affine(delta=nan)}, "not finite"),
        ({**good.sites, q: Replace({"bias": torch.ones(32)})}, "bias has shape"),
        ({norm: Affine(shift=torch.ones(32))}, "is a norm"),
        ({"model.layers.0.self_attn": Affine()}, "is an attention"),
    ]
    for edits, reason in bad:
        with pytest.raises(ValueError, match=reason):
            sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST", sites=edits))
    with pytest.raises(ValueError, match="is empty"):
        sites.route(Stream.TARGET, [(1, 3)])
    sites.install(1, good)
    with pytest.raises(ValueError, match="is taken"):
        sites.install(1, good)
    with pytest.raises(ValueError, match="is taken"):
        sites.install(0, good)
    assert_rows_alone(model, plain, sites, {1: good}, rows_for([0, 1], seed=4))


def test_what_was_vetted_is_installed_without_another_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    sites = AdaptedSites(model, stream_of=stream_of)
    rng = torch.Generator().manual_seed(4)
    q = "model.layers.0.self_attn.q_proj"
    good = Adapter(id=AdapterId("good"), method="T", sites={q: Affine(delta=low_rank(sites.specs[q], 2, rng))})
    bad = Adapter(id=AdapterId("bad"), method="T", sites={q: Affine(shift=torch.full((32,), float("inf")))})
    sites.vet(good)
    with pytest.raises(ValueError, match="not finite"):
        sites.vet(bad)
    looked: list[SiteSpec] = []
    plain = site_module.check_edit
    monkeypatch.setattr(site_module, "check_edit", lambda spec, edit: (looked.append(spec), plain(spec, edit)))
    sites.install(1, good)
    assert not looked
    with pytest.raises(ValueError, match="not finite"):
        sites.install(2, bad)
    assert looked
    sites.check()


def test_runs_of_one_slot_are_one() -> None:
    sites = AdaptedSites(build("llama"), stream_of=stream_of)
    sites.install(1, adapter(sites.specs, "lora", 1))
    sites.route(Stream.TARGET, [(0, 1), (0, 2), (1, 1), (1, 1)])
    route = sites._lanes[Stream.TARGET].route
    assert route is not None
    assert route.division == ((0, 3), (1, 2))
    assert route.slot_of_token.tolist() == [0, 0, 0, 1, 1]


def test_an_adapter_without_sites_is_the_base() -> None:
    model = build("llama")
    sites = AdaptedSites(model, stream_of=stream_of)
    sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST"))
    sites.route(Stream.TARGET, [(1, 3)])
    with torch.inference_mode():
        assert torch.equal(call(model, [1, 2, 3], [0, 1, 2]), call(build("llama"), [1, 2, 3], [0, 1, 2]))
    sites.remove(1)
