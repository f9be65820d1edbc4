"""Adds ReFT to `golden/`, after `make_golden` and in its environment.

    golden-env/bin/python -m tests.adapters.adapterhub.make_reft_golden

What a decoder generates is made by forwards over the prompt and then over one token at a time. The library's own
`generate` does the same; but it passes a mask over the whole sequence, by which adapters 1.3 looks for the last
positions outside a single token and fails, so that it is compared where only first positions are edited.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from adapters.context import ForwardContext
from safetensors.torch import save_file
from torch import Tensor, nn

import adapters
from adapters import (
    ConfigUnion,
    DiReftConfig,
    LoRAConfig,
    LoReftConfig,
    NoReftConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from tests.adapters.adapterhub.bases import ENCODERS, NUM_NEW, SEQ2SEQ, answer, base_model, inputs, seeded
from tests.adapters.adapterhub.make_golden import FILES, HERE, NAME, randomise, save

FAMILIES = ("bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama", "t5", "bart")


def forms(family: str) -> dict[str, Any]:
    some = {
        "reft_lo": LoReftConfig(r=2),
        "reft_both": NoReftConfig(r=2, prefix_positions=2, suffix_positions=2),
    }
    if family in ("bert", "gpt2", "llama", "t5"):
        last = 3 if family == "t5" else 1
        some |= {
            "reft_di": DiReftConfig(r=1, prefix_positions=1, suffix_positions=1, non_linearity="leakyrelu"),
            "reft_tied": LoReftConfig(r=3, prefix_positions=3, suffix_positions=4, tied_weights=True, layers=[0, last]),
            "reft_union": ConfigUnion(SeqBnConfig(reduction_factor=8), LoRAConfig(r=2, alpha=3), NoReftConfig(r=1)),
        }
    if family in ("bert", "llama"):
        prefix = PrefixTuningConfig(flat=True, prefix_length=3)
        some["prefix_reft"] = ConfigUnion(prefix, NoReftConfig(r=2, prefix_positions=2, suffix_positions=3))
    if family in ("gpt2", "llama"):
        some["reft_last"] = NoReftConfig(r=2, prefix_positions=0, suffix_positions=1, non_linearity="tanh")
    if family == "bert":
        some["reft_last"] = NoReftConfig(r=2, prefix_positions=0, suffix_positions=20)
        some["reft_long"] = NoReftConfig(r=2, prefix_positions=2, suffix_positions=10)  # more than there are tokens
        some["reft_longer"] = LoReftConfig(r=16, prefix_positions=4, suffix_positions=30, layers=[1])
    return some


def _with_reft(family: str, config: Any) -> Any:
    torch.manual_seed(0)  # the library fills up each orthogonal base at random
    model = base_model(family)
    adapters.init(model)
    model.add_adapter(NAME, config=config)
    model.active_adapters = NAME
    with torch.no_grad():
        originals = {name: p.clone() for name, p in model.named_parameters() if name.endswith("weight.original")}
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in originals:  # signs on the diagonal, and on one side of it what was learned
                noise = seeded(name, parameter, scale=0.5)
                parameter.copy_(originals[name] + noise.fill_diagonal_(0.0))
    _mend(family, model)
    return model.eval()


def _mend(family: str, model: Any) -> None:
    """Its Llama layer hands the cache on by a name that its attention does not read."""
    if family != "llama":
        return

    def hand_on(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"past_key_value": kwargs.pop("past_key_values", None)}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hand_on, with_kwargs=True)


@torch.no_grad()
def _tokens_by_step(family: str, model: Any) -> list[int]:
    ids = inputs(family)["input_ids"]
    given: dict[str, Any] = {}
    name = "input_ids"
    if family in SEQ2SEQ:
        with ForwardContext(model, ids):
            given["encoder_outputs"] = model.get_encoder()(input_ids=ids)
        name, ids = "decoder_input_ids", torch.tensor([[model.config.decoder_start_token_id]])
    tokens: list[int] = []
    cache = None
    while len(tokens) < NUM_NEW:
        out = model(**{name: ids}, **given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens


@torch.no_grad()
def _generated(family: str, model: Any) -> list[int]:
    ids = inputs(family)["input_ids"]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, num_beams=1
    )
    return out[0, 1 if family in SEQ2SEQ else ids.shape[1] :].tolist()


@torch.no_grad()
def make_family(family: str) -> dict[str, Tensor]:
    expected: dict[str, Tensor] = {}
    base = answer(family, base_model(family)(**inputs(family)))
    for form, config in forms(family).items():
        model = _with_reft(family, config)
        expected[form] = answer(family, model(**inputs(family))).clone()
        assert not torch.allclose(expected[form], base, atol=1e-3), (family, form)
        if family not in ENCODERS:
            tokens = _tokens_by_step(family, model)
            expected[f"{form}.tokens"] = torch.tensor(tokens)
            if form in ("reft_lo", "reft_union"):
                assert tokens == _generated(family, model), (family, form)
        place = HERE / family / form
        save(model, place, FILES)
        loaded = _loaded(family, place)
        if form == "reft_di":  # the library itself loads it as a NoReFT
            expected[f"{form}.loaded"] = loaded.clone()
            assert not torch.allclose(loaded, expected[form], atol=1e-3), family
            _complete(place)
        else:
            assert torch.allclose(loaded, expected[form], atol=1e-6), (family, form)
    return expected


def _complete(place: Path) -> None:
    """The library does not save the field that tells DiReFT from NoReFT; who trained the adapter adds it."""
    path = place / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert "subtract_projection" not in fields["config"]
    fields["config"]["subtract_projection"] = False
    path.write_text(json.dumps(fields, indent=2, sort_keys=True))


def _loaded(family: str, place: Path) -> Tensor:
    """What the library makes of the files."""
    model = base_model(family)
    adapters.init(model)
    model.load_adapter(str(place), use_safetensors=True, set_active=True)
    return answer(family, model.eval()(**inputs(family)))


def main() -> None:
    for family in FAMILIES:
        expected = make_family(family)
        made = {name: tensor.contiguous() for name, tensor in expected.items()}
        save_file(made, HERE / family / "expected_reft.safetensors")
        print(family, *expected)


if __name__ == "__main__":
    main()
