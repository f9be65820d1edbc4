"""Small files that stand for hours or for gigabytes: refused from shapes alone, in little time, with the way out."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from peft_serve.adapters.archive import files_from_parts
from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods.clusters import adamss
from peft_serve.adapters.methods.rotations import oft
from peft_serve.adapters.names import parse_expression
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from peft_serve.adapters.registry import Site
from peft_serve.adapters.saved_tokenizer import MAX_ENTRIES, reduced
from peft_serve.errors import AdapterInvalid, InvalidParameter, MalformedUpload, Refusal
from tests.attacks.giant import HIDDEN, LAYERS, GiantBase

GIANT = GiantBase()
LIMITS = GateLimits()
Tensors = Mapping[str, Tensor]
Shapes = Callable[[int, int], Mapping[str, tuple[int, ...]]]
BYTES, WORK = "bytes when compiled", "--max-compile-tflop"


def files_of(
    peft_type: str, where: str, shapes: Shapes, shared: Tensors | None = None, **fields: Any
) -> CheckpointFiles:
    """Zeros at every site whose path ends with `where`, in float16."""
    tensors = dict(shared or {})
    for path, spec in GIANT.sites.items():
        if path.endswith(where):
            for suffix, shape in shapes(spec.out_features, spec.in_features).items():
                tensors[f"base_model.model.{path}.{suffix}"] = torch.zeros(shape, dtype=torch.float16)
    config = {"peft_type": peft_type, "target_modules": [where], **fields}
    return CheckpointFiles(config=json.dumps(config).encode(), weights=save(tensors))


def _lora(o: int, i: int) -> dict[str, tuple[int, ...]]:
    return {"lora_A.weight": (1, i), "lora_B.weight": (o, 1)}


def _clusters(o: int, i: int) -> dict[str, tuple[int, ...]]:
    size = o // 2004
    factors = {f"adamss_A.{k}": (size, 1) for k in range(2004)} | {f"adamss_B.{k}": (size, size) for k in range(2004)}
    return {"adamss_newB": (1, i), **factors}


GLORA_ONE = {"r": 1, "config_A_B": "lora", "config_C": "none", "config_D_E": "none"}
PSOFT_ONE = {"psoft_alpha": 1, "ab_svd_init": "psoft_init", "psoft_svd": "full", "psoft_orth": True}
CASES: dict[str, tuple[Callable[[], CheckpointFiles], str]] = {
    "pissa": (lambda: files_of("LORA", "q_proj", _lora, r=1, lora_alpha=1, init_lora_weights="pissa"), WORK),
    "olora": (lambda: files_of("LORA", "gate_proj", _lora, r=1, lora_alpha=1, init_lora_weights="olora"), WORK),
    "kasa": (
        lambda: files_of(
            "LORA", "q_proj", lambda o, i: {**_lora(o, i), "lora_diag": (1,)}, r=1, lora_alpha=1, kasa_config={"a": 1}
        ),
        WORK,
    ),
    "psoft": (
        lambda: files_of(
            "PSOFT",
            "q_proj",
            lambda *_: {"psoft_R.weight": (0,)},
            r=1,
            psoft_mag_a=False,
            psoft_mag_b=False,
            **PSOFT_ONE,
        ),
        WORK,
    ),
    "osf": (
        lambda: files_of(
            "OSF",
            "o_proj",
            lambda o, i: {f"osf_svd_params.{n}": s for n, s in (("U_low", (o, 1)), ("S_low", (1,)), ("V_low", (1, i)))},
            effective_rank=HIDDEN - 1,
        ),
        WORK,
    ),
    "adamss": (lambda: files_of("ADAMSS", "lm_head", _clusters, r=1, num_subspaces=2004, random_seed=1), BYTES),
    "hira": (lambda: files_of("HIRA", "lm_head", lambda o, i: {"hira_A": (1, i), "hira_B": (o, 1)}, r=1), BYTES),
    "lokr": (
        lambda: files_of(
            "LOKR",
            "up_proj",
            lambda o, i: {"lokr_w1": (1, 1), "lokr_w2_a": (o, 1), "lokr_w2_b": (1, i)},
            r=1,
            alpha=1,
            decompose_both=False,
            decompose_factor=1,
        ),
        BYTES,
    ),
    "miss": (
        lambda: files_of(
            "MISS", "lm_head", lambda *_: {"miss_block": (HIDDEN, 1)}, r=HIDDEN, mini_r=1, init_weights="mini"
        ),
        BYTES,
    ),
    "glora": (
        lambda: files_of(
            "GLORA",
            "down_proj",
            lambda o, i: {
                **{f"glora_{p}.Xd": (o, 1) for p in "AB"},
                **{f"glora_{p}.Xu": (1, i) for p in "AB"},
                "glora_C.zeros": (i, 1),
                **{f"glora_{p}.zeros": (o,) for p in "DE"},
            },
            **GLORA_ONE,
        ),
        BYTES,
    ),
    "boft": (
        lambda: files_of(
            "BOFT",
            "down_proj",
            lambda o, i: {"boft_R": (2, i // 2, 2, 2), "boft_s": (o, 1)},
            boft_block_size=2,
            boft_n_butterfly_factor=2,
        ),
        BYTES,
    ),
    "fourierft": (
        lambda: files_of(
            "FOURIERFT", "lm_head", lambda *_: {"fourierft_spectrum": (1,)}, n_frequency=1, scaling=1, random_loc_seed=1
        ),
        "permutation",
    ),
    "tinylora": (
        lambda: files_of(
            "TINYLORA",
            "k_proj",
            lambda o, i: {"tinylora_A": (8, i), "tinylora_B": (o, 8)},
            {"base_model.tinylora_v.0": torch.zeros(1 << 20)},
            r=8,
            u=1 << 20,
            weight_tying=1.0,
            projection_seed=1,
            save_projection=False,
        ),
        "too many numbers to draw",
    ),
    "randlora": (
        lambda: files_of(
            "RANDLORA",
            "lm_head",
            lambda *_: {"randlora_lambda": (32, 256), "randlora_gamma": (256, HIDDEN)},
            r=32,
            randlora_alpha=1,
            save_projection=False,
            projection_prng_key=1,
            sparse=False,
            very_sparse=False,
        ),
        "too many numbers to draw",
    ),
    "adaption prompt": (
        lambda: CheckpointFiles(
            config=json.dumps({"peft_type": "ADAPTION_PROMPT", "adapter_len": 1 << 20, "adapter_layers": 1}).encode(),
            weights=save({"x": torch.zeros(1)}),
        ),
        "--max-virtual-tokens",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_it_is_tried(case: str) -> None:
    make, reason = CASES[case]
    files = make()
    assert len(files.weights) < LIMITS.max_adapter_bytes // 8, "small for what it stands for"
    started = time.thread_time()
    with pytest.raises(AdapterInvalid, match=reason):
        _tried(files, by_gate=reason in (BYTES, WORK))
    assert time.thread_time() - started < 5


def _tried(files: CheckpointFiles, *, by_gate: bool) -> None:
    inspected = inspect(files, GIANT, LIMITS)
    if not by_gate:  # what depends on all sites together is known when compiling begins
        compile_adapter(inspected, GIANT, LIMITS)


@pytest.mark.parametrize("where", ["q_proj", "lm_head"])
def test_plain_lora_passes_and_no_weight_is_read(where: str) -> None:
    files = files_of("LORA", where, _lora, r=1, lora_alpha=1)
    adapter = compile_adapter(inspect(files, GIANT, LIMITS), GIANT, LIMITS)
    assert len(adapter.sites) == (1 if where == "lm_head" else LAYERS)


def test_the_operator_decides_how_much_work_a_compile_may_be() -> None:
    """Half a dozen decompositions pass by default; with a smaller limit they do not."""
    layers = list(range(6))
    make, _ = CASES["pissa"]
    everything = make()
    files = files_of("LORA", "q_proj", _lora, r=1, lora_alpha=1, init_lora_weights="pissa", layers_to_transform=layers)
    kept = {n: t for n, t in _tensors(files).items() if any(f"layers.{k}." in n for k in layers)}
    few = CheckpointFiles(config=files.config, weights=save(kept))
    assert inspect(few, GIANT, LIMITS).summary.num_sites == 6
    with pytest.raises(AdapterInvalid, match="started with --max-compile-tflop 10;"):
        inspect(few, GIANT, GateLimits(max_compile_tflop=10))
    assert inspect(everything, GIANT, GateLimits(max_compile_tflop=2000)).summary.num_sites == LAYERS


def _tensors(files: CheckpointFiles) -> dict[str, Tensor]:
    return load(files.weights)


def test_clusters_are_multiplied_out_one_by_one() -> None:
    """Their factors side by side would be as wide as the weight has rows."""
    rows, width, size = 4096, 8, 8
    spec = SiteSpec(path="q", kind=GIANT.sites["lm_head"].kind, out_features=rows, in_features=width, parameters={})
    count = rows // size
    tensors = {"adamss_newB": torch.zeros(1, width)}
    tensors |= {f"adamss_A.{k}": torch.ones(size, 1) for k in range(count)}
    tensors |= {f"adamss_B.{k}": torch.ones(size, size) for k in range(count)}
    site = Site(
        spec=spec,
        config=Config({"random_seed": 1}),
        tensors=tensors,
        shared={},
        base=_ReadableBase(),
        prepared=lambda rows_OK: (torch.arange(len(rows_OK)) // size).numpy(),
    )
    peak = _peak_of_tensors(lambda: adamss.compile(site))
    assert peak < 4 * rows * width * 4 + 1_000_000, "a matrix [rows, rows] has 67 MB"


def test_powers_of_a_rotation_are_not_all_kept() -> None:
    side, num_terms = 512, 64
    spec = SiteSpec(path="q", kind=GIANT.sites["lm_head"].kind, out_features=8, in_features=side, parameters={})
    config = Config({"r": 1, "oft_block_size": 0, "num_cayley_neumann_terms": num_terms, "use_cayley_neumann": True})
    upper = torch.full((1, side * (side - 1) // 2), 1e-4)
    site = Site(spec=spec, config=config, tensors={"oft_R.weight": upper}, shared={}, base=GIANT)
    assert _peak_of_tensors(lambda: oft.compile(site)) < 16 * side * side * 4


class _ReadableBase(GiantBase):
    def weight(self, path: str) -> Tensor:
        return torch.eye(4096, 8)

    def bias(self, path: str) -> Tensor | None:
        return None


def _peak_of_tensors(make: Callable[[], object]) -> int:
    """The most bytes that torch had in hand at once, by its own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as seen:
        make()
    held = peak = 0
    for event in sorted(_allocations(seen), key=lambda pair: pair[0]):
        held += event[1]
        peak = max(peak, held)
    return peak


def _allocations(seen: Any) -> list[tuple[int, int]]:
    tree = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [(event.start_ns(), event.nbytes()) for event in tree]


LONG = [f"m{n}" for n in range(40_000)]
CROWDED: dict[str, dict[str, Any]] = {
    "targets": {"target_modules": ["q_proj", *LONG[:8000]]},
    "excluded": {"exclude_modules": LONG[:8000]},
    "parameters": {"target_parameters": LONG[:8000]},
    "ranks": {"rank_pattern": dict.fromkeys(LONG[:30_000], 1)},
    "gains": {"alpha_pattern": dict.fromkeys(LONG[:30_000], 1)},
    "token rows": {"trainable_token_indices": {name: [1] for name in LONG[:25_000]}},
    "blocks": {"use_bdlora": {"nblocks": 1, "match_strict": False, "target_modules_bd_a": LONG[:8000]}},
    "layers": {"layers_to_transform": list(range(60_000))},
    "containers": {"layers_to_transform": [0], "layers_pattern": LONG[:8000]},
    "base name": {"base_model_name_or_path": "x" * 500_000},
    "unknown": {"never": LONG},
}


@pytest.mark.parametrize("case", CROWDED)
def test_a_crowded_config_is_read_in_time_that_grows_with_its_size(case: str) -> None:
    files = files_of("LORA", "q_proj", _lora, **{"r": 1, "lora_alpha": 1, **CROWDED[case]})
    assert len(files.config) < LIMITS.max_config_bytes
    started = time.thread_time()
    refusals: tuple[Refusal, ...] = ()
    try:
        inspect(files, GIANT, LIMITS)
    except AdapterInvalid as refusal:
        refusals = tuple(refusal.errors)
    assert all(len(each.reason) < 1000 for each in refusals)
    assert time.thread_time() - started < 2.5


def test_what_is_told_in_every_listing_is_short() -> None:
    files = files_of("LORA", "q_proj", _lora, r=1, lora_alpha=1, base_model_name_or_path="x" * 1025)
    with pytest.raises(AdapterInvalid, match="at most 1024 characters"):
        inspect(files, GIANT, LIMITS)


@pytest.mark.parametrize("text", ["@" * 500_000 + ":a:b", "a+" * 250_000 + "a", ":" * 500_000, "@sha256:" * 60_000])
def test_an_expression_is_read_in_time_that_grows_with_its_length(text: str) -> None:
    """It is read beside the event loop's other work, so that every request would wait."""
    started = time.thread_time()
    with contextlib.suppress(InvalidParameter):
        assert len(parse_expression(text)) == 1
    assert time.thread_time() - started < 1


def test_a_tokenizer_of_millions_of_words_is_not_read() -> None:
    words = b",".join(b'"%x":1' % n for n in range(1000)) + b', "z": [' + b"1," * MAX_ENTRIES + b"1]"
    content = b'{"added_tokens":[],"model":{"vocab":{' + words + b"}}}"
    tracemalloc.start()
    try:
        with pytest.raises(MalformedUpload, match="leave the file out"):
            files_from_parts({CONFIG_FILE: b"{}", WEIGHTS_FILE: b"x", "tokenizer.json": content})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert reduced(b'{"added_tokens":[],"model":{"vocab":{"a":0}}}')


@pytest.mark.parametrize(
    "shape", [[1 << 31, 8192], [1 << 39, 1 << 39, 1 << 39], [0, 1 << 39], [1 << 40, 0], [1 << 64, 0]]
)
def test_a_header_that_lies_about_sizes(shape: list[int]) -> None:
    """As A of a LoRA: nothing is made of such a size on the way to the refusal."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    weights = len(header).to_bytes(8, "little") + header
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    with pytest.raises((AdapterInvalid, MalformedUpload)):
        inspect(CheckpointFiles(config=json.dumps(config).encode(), weights=weights), GIANT, LIMITS)
