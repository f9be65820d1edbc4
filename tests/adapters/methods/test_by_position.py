"""What the comparison of every method with peft cannot reach: oracles that need peft to be helped along."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.lora.variants import QALoraLinearVariant

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.methods.refused import REFUSED
from peft_serve.adapters.primitives import Adapter, Affine
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from peft_serve.adapters.registry import TASK_FIELD
from peft_serve.errors import AdapterInvalid
from tests.adapters.checkpoints import make_base, make_checkpoint, oracle_logits, save
from tests.adapters.fake_base import FakeBase, adapted_logits

IDS = torch.tensor([[55, 22, 28, 6, 24, 23, 50]])
DECODER_IDS = torch.tensor([[57, 14, 17]])


@cache
def base_of(kind: str) -> FakeBase:
    return FakeBase(make_base(kind))


def compiled(files: CheckpointFiles, kind: str) -> Adapter:
    return compile_adapter(inspect(files, base_of(kind), GateLimits()), base_of(kind), GateLimits())


def with_fields(files: CheckpointFiles, **fields: object) -> CheckpointFiles:
    config = {**json.loads(files.config), **fields}
    return CheckpointFiles(config=json.dumps(config).encode(), weights=files.weights)


def assert_equal_to(model: Any, files: CheckpointFiles, kind: str, *, tolerance: float = 1e-5) -> Adapter:
    adapter = compiled(files, kind)
    expected = oracle_logits(model.eval(), IDS, DECODER_IDS)
    got = adapted_logits(base_of(kind), adapter, IDS, DECODER_IDS)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    return adapter


def adapted_model(kind: str, config: peft.PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(make_base(kind), config)


def moved(model: Any, seed: int = 5) -> Any:
    """The model with trained parameters that are not what training began with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


class BlockDiagonal:
    """peft's CUDA extension in torch: [factors, n, k, k] to [factors, n k, n k]."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
@pytest.mark.parametrize(("size", "factors"), [(4, 2), (2, 3), (8, 2), (4, 3)])
def test_several_butterfly_factors(kind: str, size: int, factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    targets = {"llama": ["q_proj", "down_proj"], "opt": ["q_proj", "fc2"], "t5": ["q", "wo"]}[kind]
    config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=targets)
    config.task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    model = moved(adapted_model(kind, config))
    adapter = assert_equal_to(model, save(model), kind)
    assert all(isinstance(edit, Affine) and edit.maps and edit.in_mix is None for edit in adapter.sites.values())


def test_butterfly_factors_that_the_config_names_and_peft_did_not_train() -> None:
    """Without its CUDA extension peft trains one factor and says nothing."""
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["q_proj"])
    model = moved(adapted_model("llama", config))
    assert_equal_to(model, save(model), "llama")


def _qalora(kind: str, size: int) -> Any:
    """A model whose LoRA layers are QA-LoRA's, which peft makes on a GPTQ base alone."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_qalora=True, qalora_group_size=size
    )
    model = adapted_model(kind, config)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            QALoraLinearVariant.init(module, "default", config)
            module.lora_variant["default"] = QALoraLinearVariant()
            torch.nn.init.normal_(module.lora_B["default"].weight)
    return model


@pytest.mark.parametrize("size", [2, 16])
def test_pooled_inputs(size: int) -> None:
    model = moved(_qalora("llama", size))
    assert_equal_to(model, save(model), "llama")


def test_pooling_that_was_asked_for_and_not_done() -> None:
    """On a base that is not of GPTQ peft ignores the field, and the factors are those of plain LoRA."""
    files, model = make_checkpoint("lora", "llama")
    assert_equal_to(model, with_fields(files, use_qalora=True), "llama")


@pytest.mark.parametrize("initialisation", ["pissa", "olora", "pissa_niter_2"])
def test_converted_checkpoint_is_plain_lora(initialisation: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=initialisation)
    model = adapted_model("llama", config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = initialisation
    moved(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    where = tmp_path / "final"
    files = CheckpointFiles(config=(where / CONFIG_FILE).read_bytes(), weights=(where / WEIGHTS_FILE).read_bytes())
    adapter = assert_equal_to(model, files, "llama")
    assert adapter.max_rank == 8


def test_changes_of_base_leave_the_base_alone() -> None:
    """peft subtracts them from the shared weight; here they are part of the adapter."""
    before = base_of("llama").fingerprint()
    for method in ("lora_pissa", "lora_olora", "lora_kasa"):
        files, _ = make_checkpoint(method, "llama")
        assert compiled(files, "llama").max_rank == 8
    assert base_of("llama").fingerprint() == before


def test_invocation_that_is_absent_leaves_the_base() -> None:
    files, model = make_checkpoint("lora_activated", "llama")
    adapter = assert_equal_to(model, files, "llama")
    assert adapter.start == (30, 12)
    assert adapter.footprint(is_encoder_decoder=False).start == (30, 12)
    plain = oracle_logits(_without_adapter(), IDS, DECODER_IDS)
    assert torch.equal(adapted_logits(base_of("llama"), adapter, IDS, DECODER_IDS), plain)


def _without_adapter() -> Any:
    model = adapted_model("llama", peft.LoraConfig(target_modules=["q_proj"]))
    return model.eval()


def test_last_invocation_counts() -> None:
    files, model = make_checkpoint("lora_activated", "llama")
    adapter = compiled(files, "llama")
    ids = torch.tensor([[30, 12, 7, 8, 30, 12, 9, 30]])
    expected = oracle_logits(model, ids, DECODER_IDS)
    got = adapted_logits(base_of("llama"), adapter, ids, DECODER_IDS)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    later = adapted_logits(base_of("llama"), adapter, ids[:, :5], DECODER_IDS)
    assert not torch.allclose(got[:, 2:4], later[:, 2:4]), "the first invocation acts as long as no other follows"


def test_empty_invocation_is_plain_lora() -> None:
    files, model = make_checkpoint("lora", "llama")
    adapter = assert_equal_to(model, with_fields(files, alora_invocation_tokens=[]), "llama")
    assert adapter.start == ()


def test_every_peft_type_is_served_or_refused_by_name() -> None:
    assert METHODS.keys() | REFUSED.keys() >= {str(kind.value) for kind in peft.PeftType}
    assert not METHODS.keys() & REFUSED.keys()


@pytest.mark.parametrize("peft_type", sorted(METHODS))
def test_every_field_of_peft_is_read_inert_or_refused_by_name(peft_type: str) -> None:
    """An unknown field is refused as such; none of peft's own may come to that."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from peft_serve.adapters.config_schema import INERT, OPTIONAL
    from peft_serve.adapters.config_schema import REFUSED as REFUSED_FIELDS

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]
    schema = METHODS[peft_type].schema
    known = {*schema.required, *schema.optional, *schema.inert, *schema.refused, *INERT, *OPTIONAL, *REFUSED_FIELDS}
    fields = {name for name in config_class.__dataclass_fields__ if not name.startswith("_")}
    assert fields - known - {"peft_type"} == set()


def test_tasks_of_one_checkpoint() -> None:
    method = METHODS["MULTITASK_PROMPT_TUNING"]
    assert method.num_tasks(Config({"num_tasks": 3})) == 3
    assert method.num_tasks(Config({})) == 1
    inspected = inspect(make_checkpoint("multitask_prompt_tuning", "llama")[0], base_of("llama"), GateLimits())
    for task in (-1, 3):
        asked = replace(inspected, config=Config({**inspected.config.fields, TASK_FIELD: task}))
        with pytest.raises(AdapterInvalid, match=r"tasks 0 \.\.\. 2"):
            compile_adapter(asked, base_of("llama"), GateLimits())


def test_block_size_that_does_not_divide_is_adjusted_as_in_peft() -> None:
    for size in (5, 7, 9, 20, 31, 33, 100):
        config = peft.OFTConfig(oft_block_size=size, target_modules=["q_proj", "down_proj"])
        model = moved(adapted_model("llama", config))
        assert_equal_to(model, save(model), "llama")
