"""Bases from folders: what is loaded, and what is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM, PreTrainedModel, XGLMConfig, XGLMForCausalLM, modeling_utils

from peft_serve.model import loader
from peft_serve.model.families.registry import family_of, is_known
from peft_serve.model.loader import NotServable, load_base, resolve_dtype, wrap
from tests.model.tiny_models import NO_SPECIALS, VOCAB, tiny


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_folder_is_loaded_frozen_and_checked(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    folder = saved(tiny(name), tmp_path / "my-base")
    base = load_base(str(folder), dtype="float32", device="cpu", on_progress=said.append)
    assert (base.name, base.family, base.dtype) == ("my-base", name, torch.float32)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert any("largest difference" in line for line in said)
    original = tiny(name).state_dict()
    assert all(torch.equal(p, original[path]) for path, p in base.model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_weights_is_read_and_not_mapped(dtype: str, tmp_path: Path) -> None:
    """Where a file is mapped and cut short, the next read of a weight ends the process."""
    folder = saved(tiny("llama"), tmp_path)
    opened = modeling_utils.safe_open
    base = load_base(str(folder), dtype=dtype, device="cpu")
    assert modeling_utils.safe_open is opened
    before = base.fingerprint()
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    (folder / "model.safetensors").write_bytes(b"")
    assert base.fingerprint() == before


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_half_precision_base_passes_its_check(name: str, tmp_path: Path) -> None:
    base = load_base(str(saved(tiny(name), tmp_path)), dtype="bfloat16", device="cpu")
    assert base.dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["demo-llama", "demo-t5"])
def test_the_demo_bases_are_in_the_package(name: str) -> None:
    base = load_base(name, device="cpu")
    assert base.name == name
    assert base.eos_ids == {1}


def test_a_demo_that_was_left_out_of_the_wheel_says_where_to_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_DEMOS", tmp_path)
    with pytest.raises(NotServable, match=r"demo-t5 is not part of this installation.*checkout"):
        load_base("demo-t5")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    evil = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass C: pass\n"
    (tmp_path / "evil.py").write_text(evil)
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(NotServable, match="their own code are not run"):
        load_base(str(tmp_path))
    saved(tiny("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert load_base(str(tmp_path), device="cpu").class_name == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(NotServable, match="safetensors"):
        load_base(str(tmp_path))


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("layers.1.mlp.up_proj.weight")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(NotServable, match=r"1 weights are missing, model\.layers\.1\.mlp\.up_proj"):
        load_base(str(tmp_path), device="cpu")


def test_a_file_that_was_cut_short_is_refused_in_a_line(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(NotServable) as refusal:
        load_base(str(tmp_path), device="cpu")
    assert "\n" not in str(refusal.value)
    assert "safetensors" in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "no configuration"),
        ({"model_type": "vit"}, "no language-modelling head"),
        ({"model_type": "made-up"}, "not in this version"),
    ],
)
def test_what_is_no_language_model_is_refused(config: dict[str, str] | None, reason: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotServable, match=reason):
        load_base(str(tmp_path))


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for missing in (str(tmp_path / "nothing"), "./nothing", "org/model/part"):
        with pytest.raises(NotServable, match="there is no such folder"):
            load_base(missing)
    with pytest.raises(NotServable, match="is an adapter"):
        load_base(str(tmp_path))


def test_an_unknown_model_is_served_if_it_passes_the_check() -> None:
    torch.manual_seed(0)
    config = ArceeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **NO_SPECIALS,
    )
    assert not is_known("arcee")
    said: list[str] = []
    base = wrap(ArceeForCausalLM(config), name="tiny-arcee", on_progress=said.append)
    assert base.shape.head_dim == 8
    assert "(arcee) is not among those tested with peft-serve; its values agree to" in said[-1]


def test_an_unknown_model_with_an_attention_of_its_own_is_refused() -> None:
    config = XGLMConfig(vocab_size=VOCAB, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, **NO_SPECIALS)
    with pytest.raises(NotServable, match="tiny-xglm: a model of type 'xglm' is not supported"):
        wrap(XGLMForCausalLM(config), name="tiny-xglm")


def test_a_model_whose_answers_change_is_refused() -> None:
    """A model that looks like a known one but counts positions in a way of its own."""

    class Backwards(type(tiny("gpt2"))):  # type: ignore[misc]
        def forward(self, position_ids: torch.Tensor | None = None, **more: object) -> object:
            return super().forward(position_ids=None if position_ids is None else 99 - position_ids, **more)

    model = tiny("gpt2")
    model.__class__ = Backwards
    with pytest.raises(NotServable, match="differ by"):
        wrap(model, name="backwards")


def test_a_rotary_table_made_for_the_longest_row_sets_a_limit() -> None:
    model = tiny("llama")
    given = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    model.config.rope_parameters = {**model.config.rope_parameters, **given}
    family = family_of(model)
    assert family.has_position_limit
    assert family.shape.max_positions == 64


def test_settings_name_a_dtype() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype("float16", cpu) is torch.float16
    with pytest.raises(NotServable, match="not one of"):
        resolve_dtype("int4", cpu)
