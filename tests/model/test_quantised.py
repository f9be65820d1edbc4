"""Quantised bases: what they are made of, what they are served from, and that adapters on them equal peft's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter, Affine, LowRank, Replace
from peft_serve.core import BASE, AdapterId
from peft_serve.model.base import ResidentBase
from peft_serve.model.loader import NotServable, load_base, wrap
from peft_serve.model.quantised import (
    OWN,
    Quantisation,
    is_quantised,
    num_parameters,
    quantisation_config,
    quantisation_of,
)
from tests.adapters.checkpoints import make_checkpoint
from tests.model.driver import Driver, random_jobs
from tests.model.test_generation import expected
from tests.model.tiny_models import VOCAB, causal_sizes, randomised, tiny

LIBRARY = {
    Quantisation.BNB_NF4: "bitsandbytes",
    Quantisation.BNB_INT8: "bitsandbytes",
    Quantisation.TORCHAO_INT8: "torchao",
}
METHODS = {
    Quantisation.INT8: ("lora", "lora_rslora", "lora_dora", "ia3", "oft", "lora_saved"),
    Quantisation.FP8: ("lora", "lora_dora", "ia3", "lora_saved"),
    Quantisation.BNB_NF4: ("lora", "lora_rslora", "lora_dora", "ia3", "lora_saved"),
    Quantisation.BNB_INT8: ("lora", "lora_rslora", "ia3", "lora_saved"),  # peft's DoRA loses int8 scales on a CPU
    Quantisation.TORCHAO_INT8: ("lora", "lora_rslora", "lora_dora", "ia3", "lora_saved"),
}
ROUNDING = {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}
SITE = "model.layers.0.self_attn.q_proj"

# What the libraries warn about when they are imported is theirs.
on_library = pytest.mark.filterwarnings("ignore")


class Rounded(Tensor):
    """A weight in 8 bits that multiplies as the matrix it stands for, in the way torchao makes its own."""

    values: Tensor
    step: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, step: Tensor) -> Rounded:
        made: Rounded = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=step.dtype)  # type: ignore[attr-defined]
        made.values, made.step = values, step
        return made

    @classmethod
    def of(cls, matrix: Tensor) -> Rounded:
        step = matrix.abs().amax(dim=1, keepdim=True) / 127
        return cls((matrix / step).round().to(torch.int8), step)

    def dequantize(self) -> Tensor:
        return self.values.to(self.step.dtype) * self.step

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "step"], None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is linear:
            x, weight, *rest = args
            return linear(x, weight.dequantize(), *rest, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].step)
        raise AssertionError(f"nobody should do {function} with a packed weight")


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every Linear but its head quantised."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            module.weight = nn.Parameter(Rounded.of(module.weight.detach()), requires_grad=False)
    return model


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The model of plain weights that a `rounded` one stands for."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            module.weight = nn.Parameter(Rounded.of(module.weight.detach()).dequantize(), requires_grad=False)
    return model


def test_a_quantised_linear_is_a_site_of_the_shape_it_stands_for() -> None:
    base, plain = ResidentBase(rounded(tiny("llama")), name="q"), dequantised(tiny("llama"))
    assert base.sites[SITE].kind is SiteKind.LINEAR
    assert base.sites[SITE].parameters == {"weight": (32, 32)}
    assert base.dtype is torch.float32
    linears = [path for path, spec in base.sites.items() if spec.kind is SiteKind.LINEAR]
    assert linears
    for path in linears:
        assert torch.equal(base.weight(path), plain.get_submodule(path).weight), path
        assert is_quantised(base.model.get_submodule(path)) == (path != "lm_head")


def test_the_fingerprint_covers_packed_weights() -> None:
    model = rounded(tiny("llama"))
    base = ResidentBase(model, name="q")
    before = base.fingerprint()
    assert base.fingerprint() == before
    packed: Any = model.get_submodule(SITE).weight
    packed.values[3, 4] += 1
    changed = base.fingerprint()
    assert changed != before
    packed.step[2] *= 2
    assert base.fingerprint() not in (before, changed)


def test_rows_with_adapters_meet_the_weights_a_quantised_base_stands_for() -> None:
    """Packing, which needs plain weights, leaves quantised ones alone."""
    torch.manual_seed(1)
    delta = LowRank(0.3 * torch.randn(3, 32), torch.randn(32, 3))
    one = Adapter(
        id=AdapterId("sha256:one"), method="LORA", sites={SITE: Affine(delta=delta, out_scale=torch.rand(32))}
    )
    outputs = []
    for model in (rounded(tiny("llama")), dequantised(tiny("llama"))):
        base = wrap(model, name="q")
        base.adapted.pack()
        driver = Driver(base, {one.id: one}, seed=1)
        driver.install(one.id)
        jobs = random_jobs(random.Random(2), count=6, vocab=VOCAB, adapter=lambda i: one.id if i % 2 else BASE)
        driver.finish(jobs)
        outputs.append([(job.output, pytest.approx(job.logprobs, abs=2e-4)) for job in jobs])
    assert outputs[0] == [(tokens, logprobs.expected) for tokens, logprobs in outputs[1]]


def test_parameters_of_a_quantised_site_are_not_replaced() -> None:
    base = ResidentBase(rounded(tiny("llama")), name="q")
    own = Adapter(id=AdapterId("sha256:own"), method="LORA", sites={SITE: Replace({"weight": torch.ones(32, 32)})})
    with pytest.raises(ValueError, match=f"'{SITE}' is quantised"):
        base.adapted.install(1, own)


@pytest.mark.parametrize(
    ("saved", "wanted", "reason"),
    [
        ("torchao", None, "Int8DynamicActivationInt8WeightConfig, which rounds activations too"),
        ("gptq", None, "quantised with gptq; served are bitsandbytes and torchao"),
        ("bitsandbytes", "bnb-nf4", "quantised with bitsandbytes already; leave --quantisation out"),
    ],
)
def test_what_cannot_be_loaded_is_refused(saved: str, wanted: str | None, reason: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": saved, "quant_type": {"default": ROUNDING}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotServable, match=reason):
        load_base(str(tmp_path), device="cpu", quantisation=wanted)


@pytest.mark.parametrize(
    ("saved", "wanted", "named"),
    [
        (None, None, None),
        (None, "int8", "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None, "bnb-nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, None, "bnb-int8"),
        ({"quant_method": "torchao"}, None, "torchao"),
    ],
)
def test_what_weights_are_stored_in_has_a_name(saved: Any, wanted: str | None, named: str | None) -> None:
    config = LlamaConfig(**causal_sizes())
    if saved is not None:
        config.quantization_config = saved
    assert quantisation_of(config, wanted) == named


def test_a_library_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(NotServable, match=r"bnb-nf4 needs a library.*bitsandbytes.*install peft-serve\[quantised\]"):
        load_base(str(tmp_path), device="cpu", quantisation="bnb-nf4")


# ---- from a folder: our own kinds, and those of the libraries where they are installed


def make_llama() -> PreTrainedModel:
    """Wide enough for blocks of 64 values."""
    sizes = causal_sizes(hidden_size=64, intermediate_size=128, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture(params=list(Quantisation))
def kind(request: pytest.FixtureRequest) -> Quantisation:
    if request.param in LIBRARY:
        pytest.importorskip(LIBRARY[request.param], exc_type=ImportError)
    return request.param


def loaded_alone(folder: Path, kind: Quantisation | BitsAndBytesConfig) -> PreTrainedModel:
    """The base as somebody who trains adapters has it. Ours is no library's, so that it is a plain one of the weights
    that ours stand for."""
    if kind in OWN:
        plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for module in plain.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.copy_(stood_for(module.weight.detach(), kind))
        return plain
    model = LlamaForCausalLM.from_pretrained(
        folder,
        quantization_config=quantisation_config(kind, torch.float32) if isinstance(kind, Quantisation) else kind,
        dtype=torch.float32,
        device_map={"": "cpu"},
        attn_implementation="eager",
    )
    return model.eval()


def stood_for(matrix: Tensor, kind: object) -> Tensor:
    """The matrix in 8 bits, by a step for each output."""
    if kind is Quantisation.FP8:
        step = (matrix.abs().amax(dim=1, keepdim=True) / 448).bfloat16().float()
        return (matrix / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    step = (matrix.abs().amax(dim=1, keepdim=True) / 127).bfloat16().float()
    return (matrix / step).round().clamp(-127, 127) * step


@on_library
def test_adapters_on_a_quantised_base_equal_peft(kind: Quantisation, tmp_path: Path) -> None:
    randomised(make_llama, 0).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="float32", device="cpu", quantisation=kind)
    assert is_quantised(base.model.get_submodule(SITE))
    assert base.sites[SITE].parameters == {"weight": (64, 64)}
    before = base.fingerprint()
    oracles: dict[AdapterId, Any] = {BASE: loaded_alone(tmp_path, kind)}
    adapters = {}
    for seed, method in enumerate(METHODS[kind]):
        files, oracle = make_checkpoint(method, "llama", seed, base=loaded_alone(tmp_path, kind))
        adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
        adapters[adapter.id] = adapter
        oracles[adapter.id] = oracle
    driver = Driver(base, adapters, seed=1)
    driver.install(*adapters)
    ids = [BASE, *adapters]
    jobs = random_jobs(random.Random(2), count=12, vocab=VOCAB, adapter=lambda i: ids[i % len(ids)])
    driver.finish(jobs)
    for job in jobs:
        output, logprobs = expected(oracles[job.adapter], job)
        assert job.output == output, job.adapter
        assert job.logprobs == pytest.approx(logprobs, abs=2e-4)
    assert len({tuple(job.output) for job in jobs}) > len(ids) - 2
    assert base.fingerprint() == before


@on_library
def test_the_weight_a_base_gives_is_the_one_it_multiplies_by(kind: Quantisation, tmp_path: Path) -> None:
    randomised(make_llama, 0).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="float32", device="cpu", quantisation=kind)
    x = torch.randn(5, 64)
    with torch.inference_mode():
        own = base.model.get_submodule(SITE)(x)
    error = (linear(x, base.weight(SITE)) - own).norm() / own.norm()
    assert error < (2e-2 if kind is Quantisation.BNB_INT8 else 1e-5)  # which rounds what it multiplies, too


@on_library
def test_a_base_that_was_saved_quantised_is_loaded(kind: Quantisation, tmp_path: Path) -> None:
    if kind in OWN:
        pytest.skip("ours is not saved")
    randomised(make_llama, 0).save_pretrained(tmp_path / "plain")
    loaded_alone(tmp_path / "plain", kind).save_pretrained(tmp_path / "packed")
    packed = load_base(str(tmp_path / "packed"), dtype="float32", device="cpu")
    at_load = load_base(str(tmp_path / "plain"), dtype="float32", device="cpu", quantisation=kind)
    assert torch.equal(packed.weight(SITE), at_load.weight(SITE))
    assert packed.dtype is torch.float32
    assert num_parameters(packed.model) == num_parameters(make_llama())


@on_library
def test_four_bits_with_quantised_scales_are_read_back(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    randomised(make_llama, 0).save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    model = loaded_alone(tmp_path / "plain", config)
    model.save_pretrained(tmp_path / "packed")
    base = load_base(str(tmp_path / "packed"), dtype="float32", device="cpu")
    packed: Any = model.get_submodule(SITE).weight
    assert torch.equal(base.weight(SITE), bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state))
    before = base.fingerprint()
    scales: Any = base.model.get_submodule(SITE)
    scales.weight.quant_state.state2.absmax[0] += 1
    assert base.fingerprint() != before


@on_library
def test_int8_with_columns_chosen_by_the_whole_batch_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    randomised(make_llama, 0).save_pretrained(tmp_path / "plain")
    loaded_alone(tmp_path / "plain", Quantisation.BNB_INT8).save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 6.0
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(NotServable, match="depends on the requests beside it; set llm_int8_threshold to 0"):
        load_base(str(tmp_path / "packed"), device="cpu")
