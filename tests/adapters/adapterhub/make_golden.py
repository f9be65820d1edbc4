"""Makes `golden/`: checkpoints saved by AdapterHub's `adapters`, and what that library computes with them.

That library needs transformers 4, so this runs in an environment of its own, from the root of the repository:

    python -m venv golden-env && golden-env/bin/pip install torch 'transformers~=4.57.6' adapters==1.3.0
    golden-env/bin/python -m tests.adapters.adapterhub.make_golden

and then `make_reft_golden`, which adds ReFT.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

import adapters
from adapters import (
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    DoubleSeqBnInvConfig,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    VeraConfig,
)
from tests.adapters.adapterhub.bases import (
    ENCODERS,
    FAMILIES,
    NUM_NEW,
    SEQ2SEQ,
    answer,
    base_model,
    config_of,
    inputs,
    seeded,
)
from tests.adapters.adapterhub.bases import set_weights as set_base_weights

HERE: Final = Path(__file__).parent / "golden"
NAME: Final = "tuned"
FILES: Final = ("adapter_config.json", "adapter.safetensors")
HEAD_FILES: Final = ("head_config.json", "model_head.safetensors")


def _bn(**given: Any) -> BnConfig:
    return BnConfig(
        **{"mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "gelu"} | given
    )


def everywhere() -> dict[str, Any]:
    return {
        "seq": SeqBnConfig(reduction_factor=4),
        "double": DoubleSeqBnConfig(reduction_factor=4),
        "parallel": ParBnConfig(reduction_factor=4),
        "plus": AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
        "lora": LoRAConfig(r=3, alpha=5, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]),
        "ia3": IA3Config(),
        "dora": DoRAConfig(r=2, alpha=6),
    }


def details() -> dict[str, Any]:
    """Every way in which the flags of a bottleneck change its formula."""
    return {
        "factors": SeqBnConfig(reduction_factor={"0": 8, "default": 4}, non_linearity="leakyrelu", scaling="learned"),
        "left_out": DoubleSeqBnConfig(reduction_factor=4, leave_out=[0], scaling="channel"),
        "norm_before": _bn(ln_before=True, original_ln_before=True, non_linearity="tanh"),
        "norm_after": _bn(ln_after=True, scaling=2.0),
        "norm_kept": _bn(ln_before=True, ln_after=True, adapter_residual_before_ln=True, original_ln_before=True),
        "alone": _bn(original_ln_after=False),
        "alone_kept": _bn(original_ln_after=False, original_ln_before=True, residual_before_ln=False),
        "kept_normed": _bn(original_ln_before=True, residual_before_ln=False),
        "parallel_alone": _bn(is_parallel=True, original_ln_after=False, ln_after=True, scaling="learned"),
        "parallel_both": _bn(is_parallel=True, original_ln_before=True, ln_before=True),
        "both": ConfigUnion(SeqBnConfig(reduction_factor=4), LoRAConfig(r=2, alpha=4)),
        "lora_rank_one": LoRAConfig(r=1, alpha=3, attn_matrices=["v"]),
        "ia3_output": IA3Config(output_lora=True, attn_matrices=["q", "v"], alpha=2),
    }


def prefixes(family: str) -> dict[str, Any]:
    """Prefix tuning, in both its forms and beside other methods; its modules share tensors."""
    flat = PrefixTuningConfig(flat=True, prefix_length=3)
    some: dict[str, Any] = {
        "prefix": PrefixTuningConfig(prefix_length=5, bottleneck_size=4),
        "prefix_flat": flat,
        "mam": MAMConfig(PrefixTuningConfig(prefix_length=2, bottleneck_size=6), ParBnConfig(reduction_factor=4)),
        "prefix_lora": ConfigUnion(flat, LoRAConfig(r=2, alpha=4)),
    }
    if family in ("t5", "bart"):
        some["prefix_decoder"] = PrefixTuningConfig(flat=True, prefix_length=3, encoder_prefix=False)
        some["prefix_encoder"] = PrefixTuningConfig(flat=True, prefix_length=4, cross_prefix=False, leave_out=[2, 3])
    if family not in ("t5", "t5-gated", "mt5"):  # where the library loses the bias of distances
        some["prefix_left_out"] = PrefixTuningConfig(
            prefix_length=4, bottleneck_size=3, leave_out=[0, 3], non_linearity="gelu_new"
        )
    if family in ("mistral", "mistral-window", "roberta", "electra", "xlm-roberta", "t5-gated", "mt5"):
        some = {"prefix": some["prefix"]}
    return {} if family == "deberta-v2" else some


def prompts(family: str) -> dict[str, Any]:
    """The library has prompt tuning for encoders of BERT's kind."""
    if family not in ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"):
        return {}
    some: dict[str, Any] = {"prompt": PromptTuningConfig(prompt_length=3)}
    if family == "bert":
        some["prompt_union"] = ConfigUnion(some["prompt"], LoRAConfig(r=2, alpha=4), SeqBnConfig(reduction_factor=4))
        some["prompt_prefix"] = ConfigUnion(some["prompt"], PrefixTuningConfig(flat=True, prefix_length=2))
    return {"refused_prompt": some["prompt"]} if family == "deberta-v2" else some


def forms(family: str) -> dict[str, Any]:
    some = everywhere()
    if family == "gpt2":
        del some["dora"]  # adapters itself cannot run it there
    if family in ("bert", "llama"):
        some |= details()
        some["refused_compacter"] = CompacterConfig(reduction_factor=4, phm_dim=2)
        some["refused_vera"] = VeraConfig(r=2)
    if family in ("bert", "gpt2", "llama", "t5", "distilbert", "bart"):
        some["invertible"] = SeqBnInvConfig(reduction_factor=4)
    if family == "bert":
        some["post_add"] = _bn(original_ln_before=True, residual_before_ln="post_add")
        some["invertible_double"] = DoubleSeqBnInvConfig(reduction_factor=4)
    if family in ("t5", "bart"):
        some["cross"] = DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True)
    if family in ("mistral", "mistral-window", "roberta", "electra", "xlm-roberta", "deberta-v2", "t5-gated", "mt5"):
        some = {name: some[name] for name in ("seq", "double", "lora")}
    return some | prefixes(family) | prompts(family)


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{NAME}." not in name:
                continue
            value = parameter.detach().clone()
            if name.endswith(".m.weight"):  # DoRA's lengths begin at the base's own
                parameter.mul_(seeded(name, value, scale=0.2, about=1.0))
            else:  # gains, scales and the vectors of (IA)3 begin at one
                is_gain = (bool((value == 1).all()) and value.numel() > 1) or name.endswith("scaling")
                parameter.copy_(seeded(name, value, scale=0.3, about=1.0 if is_gain else 0.0))


def _run(family: str, model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return answer(family, model(**inputs(family), **more)).clone()


def _tokens(family: str, model: Any) -> Tensor:
    """What it generates greedily, the prompt of a decoder left out."""
    ids = inputs(family)["input_ids"]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            num_beams=1,
            use_cache=False,  # with one, this version of the library loses the prompt on Llama
        )
    return out[0, 1:] if family in SEQ2SEQ else out[0, ids.shape[1] :]


def make_family(family: str) -> dict[str, Tensor]:
    expected = {"base": _run(family, base_model(family))}
    for form, config in forms(family).items():
        model = base_model(family)
        adapters.init(model)
        model.add_adapter(NAME, config=config)
        model.active_adapters = NAME
        randomise(model)
        model.eval()
        if not form.startswith("refused"):
            expected[form] = _run(family, model)
            if family not in ENCODERS:
                expected[f"{form}.tokens"] = _tokens(family, model)
            own = expected[form][-len(expected["base"]) :]  # a soft prompt has states of its own
            assert not torch.allclose(own, expected["base"], atol=1e-3), (family, form)
        save(model, HERE / family / form, FILES)
    return expected


def save(model: Any, place: Path, files: tuple[str, ...]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_adapter(folder, NAME, use_safetensors=True)
        except RuntimeError:  # one tensor under several names, which safetensors refuses: saved by way of a pickle
            model.save_adapter(folder, NAME, use_safetensors=False)
            state = torch.load(Path(folder) / "pytorch_adapter.bin", weights_only=True)
            is_whole = place.parent.name in ("bert", "llama")  # with the copies that every attention module holds
            kept = {name: tensor.clone() for name, tensor in state.items() if is_whole or ".pool." not in name}
            save_file(kept, Path(folder) / "adapter.safetensors")
        for file in files:
            shutil.copy(Path(folder) / file, place / file)


HEADS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "classification": ("add_classification_head", {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}),
    "classification_relu": ("add_classification_head", {"num_labels": 2, "activation_function": "relu"}),
    "classification_one_layer": ("add_classification_head", {"num_labels": 4, "layers": 1}),
    "classification_pooler": ("add_classification_head", {"num_labels": 2, "layers": 1, "use_pooler": True}),
    "tagging": ("add_tagging_head", {"num_labels": 5}),
    "qa": ("add_qa_head", {}),
}


def make_heads(family: str) -> dict[str, Tensor]:
    expected: dict[str, Tensor] = {}
    for form, (add, given) in HEADS.items():
        if form == "classification_pooler" and family != "bert":
            continue
        model = getattr(adapters, f"{base_model(family).__class__.__name__.removesuffix('Model')}AdapterModel")(
            config_of(family)
        )
        set_base_weights(model.base_model)
        model.add_adapter(NAME, config=SeqBnConfig(reduction_factor=8))
        getattr(model, add)(NAME, **given)
        model.active_adapters = NAME
        randomise(model)
        model.eval()
        with torch.no_grad():
            out = model(**inputs(family))
        if form == "qa":
            expected[form] = torch.stack([out.start_logits[0], out.end_logits[0]], dim=-1)
        else:
            expected[form] = out.logits[0].clone()
        save(model, HERE / family / f"head_{form}", (*FILES, *HEAD_FILES))
    return {f"head_{form}": tensor for form, tensor in expected.items()}


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    for family in FAMILIES:
        expected = make_family(family)
        if family in ("bert", "roberta", "distilbert"):
            expected |= make_heads(family)
        save_file(
            {name: tensor.contiguous() for name, tensor in expected.items()}, HERE / family / "expected.safetensors"
        )
        print(family, *expected)


if __name__ == "__main__":
    main()
