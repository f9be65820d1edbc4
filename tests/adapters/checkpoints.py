"""Checkpoints of every served method, made by peft itself on tiny random models.

`make_checkpoint(method, base_kind, seed)` gives the files as uploaded and the peft model that is the oracle.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from transformers import PreTrainedModel

from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from tests.adapters.making import by_position, by_weight, factors
from tests.adapters.places import embedding, feed_forward, head, norms, targets

VOCAB: Final = 64
HIDDEN: Final = 32
DECODERS: Final = ("llama", "llama_tied", "qwen2", "mistral", "gemma", "gpt2", "opt", "neox", "phi", "bloom")
SEQ2SEQ: Final = ("t5", "bart", "bart_scaled")
WHOLE: Final = ("llama", "gpt2", "t5")
"""A decoder with grouped heads, one with Conv1D and biases, an encoder-decoder: every method is tried on these."""
TWINS: Final = ("llama_tied", "mistral", "bart_scaled")
"""Linear layers of the same names and shapes as another kind's, run by the same family: a weight that is tied, a class
of its own, a scaled embedding are all that is new."""
BASE_KINDS: Final = (*DECODERS, *SEQ2SEQ)
SOFT_SPOKEN: Final = ("vera_lambda", "unilora_theta_d", "delora_lambda")  # they matter only when large
MIXTURES: Final = ("mixtral", "gpt_oss")  # of fused experts, the second one's matrices stored [in, out]


def _llama_like(**more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return {**sizes, **heads, **more}


def _bart(**more: Any) -> transformers.BartConfig:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": VOCAB, "d_model": HIDDEN, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return transformers.BartConfig(**layers, **sizes, max_position_embeddings=128, **more)


_CONFIGS: Final[dict[str, Callable[[], Any]]] = {
    "llama": lambda: transformers.LlamaConfig(**_llama_like()),
    "llama_tied": lambda: transformers.LlamaConfig(**_llama_like(tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2Config(**_llama_like()),
    "mistral": lambda: transformers.MistralConfig(**_llama_like()),
    "gemma": lambda: transformers.Gemma3TextConfig(**_llama_like(head_dim=8)),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "phi": lambda: transformers.PhiConfig(**{**_llama_like(), "num_key_value_heads": 4}),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=4),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_llama_like(num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_llama_like(head_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32)
    ),
    "bart": _bart,
    "bart_scaled": lambda: _bart(scale_embedding=True),
}


def _lora(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets(kind), **more})


def _ia3(kind: str) -> peft.PeftConfig:
    down = feed_forward(kind)
    others = [name for name in targets(kind) if name not in down.split(".")]
    return peft.IA3Config(target_modules=[*others, down], feedforward_modules=[down])


_METHODS: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "lora": _lora,
    "lora_rslora": lambda kind: _lora(kind, use_rslora=True),
    "lora_pattern": lambda kind: _lora(
        kind, rank_pattern={targets(kind)[0]: 2}, alpha_pattern={targets(kind)[1]: 3}, use_rslora=True
    ),
    "lora_bias": lambda kind: _lora(kind, lora_bias=True),
    "lora_bias_all": lambda kind: _lora(kind, bias="all"),
    "lora_bias_only": lambda kind: _lora(kind, bias="lora_only"),
    "lora_dora": lambda kind: _lora(kind, use_dora=True),
    "lora_dora_bias_all": lambda kind: _lora(kind, use_dora=True, bias="all"),
    "lora_all_linear": lambda kind: _lora(kind, target_modules="all-linear"),
    "lora_layers": lambda kind: _lora(kind, layers_to_transform=[1]),
    "lora_excluded": lambda kind: _lora(kind, exclude_modules=[targets(kind)[0]]),
    "lora_embedding": lambda kind: _lora(kind, target_modules=[embedding(kind), targets(kind)[0]]),
    "lora_embedding_dora": lambda kind: _lora(kind, target_modules=[embedding(kind), head(kind)], use_dora=True),
    "lora_head": lambda kind: _lora(kind, target_modules=[head(kind), targets(kind)[0]]),
    "lora_saved": lambda kind: _lora(kind, modules_to_save=[head(kind), norms(kind)[0]]),
    "lora_saved_embedding": lambda kind: _lora(kind, modules_to_save=[embedding(kind)]),
    "lora_saved_bias_all": lambda kind: _lora(kind, modules_to_save=[norms(kind)[-1]], bias="all"),
    "lora_tying": lambda kind: _lora(kind, target_modules=[embedding(kind)], ensure_weight_tying=True),
    "lora_saved_tying": lambda kind: _lora(kind, modules_to_save=[embedding(kind)], ensure_weight_tying=True),
    "lora_shared": lambda kind: _lora(kind, target_modules=["shared", targets(kind)[0]]),
    "ia3": _ia3,
    "ln_tuning": lambda kind: peft.LNTuningConfig(target_modules=norms(kind)),
    "ln_tuning_saved": lambda kind: peft.LNTuningConfig(target_modules=norms(kind), modules_to_save=[head(kind)]),
    "prompt_tuning": lambda _: peft.PromptTuningConfig(num_virtual_tokens=5),
    "prompt_tuning_saved": lambda kind: peft.PromptTuningConfig(num_virtual_tokens=3, modules_to_save=[head(kind)]),
    "p_tuning": lambda _: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
    "p_tuning_lstm": lambda _: peft.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "prefix_tuning": lambda _: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prefix_tuning_projection": lambda _: peft.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    **factors.METHODS,
    **by_weight.METHODS,
    **by_position.METHODS,
}
_ONLY: Final[dict[str, tuple[str, ...]]] = {
    "lora_tying": ("llama_tied", "gemma"),
    "lora_saved_tying": ("llama_tied", "gemma"),
    "lora_shared": ("t5",),
    **factors.ONLY,
    **by_weight.ONLY,
    **by_position.ONLY,
}


def methods_for(base_kind: str) -> tuple[str, ...]:
    """Every method id that peft can make on this base."""
    return tuple(name for name in _METHODS if base_kind in _ONLY.get(name, (base_kind,)))


_BY_FAMILY: Final = ("lora_bias_all", "lora_dora", "lora_embedding", "lora_head", "lora_saved", "lora_tokens")
_OF_EACH_PLACE: Final = (
    *("lora", "ia3", "ln_tuning", "prompt_tuning", "prefix_tuning", "adaption_prompt", "cpt", "trainable_tokens"),
    *_BY_FAMILY,
)


def telling_methods_for(base_kind: str) -> tuple[str, ...]:
    """Every method id on the three kinds of `WHOLE`; elsewhere one of each peft type, the variants of LoRA that act on
    places which families lay out differently, and the ids that no kind of `WHOLE` has. Of a kind of `TWINS` what acts
    on each place, and those ids."""
    names = methods_for(base_kind)
    if base_kind in WHOLE:
        return names
    if base_kind in TWINS:
        return tuple(name for name in names if name in _OF_EACH_PLACE or _is_rare(name))
    types: set[str] = set()
    telling = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns about projections that are not saved
            peft_type = str(_METHODS[name](base_kind).peft_type)
        if name in _BY_FAMILY or _is_rare(name) or peft_type not in types:
            telling.append(name)
        types.add(peft_type)
    return tuple(telling)


def _is_rare(name: str) -> bool:
    return not set(WHOLE) & set(_ONLY.get(name, WHOLE))


def base_config(base_kind: str) -> Any:
    """The transformers config of the tiny base of a kind."""
    return _CONFIGS[base_kind]()


def make_base(base_kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model in float32; the same seed gives the same weights, and leaves torch's generator the same."""
    model, state = _made_base(base_kind, seed)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@cache
def _made_base(base_kind: str, seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    return base_of_config(base_kind, base_config(base_kind), seed), torch.get_rng_state()


def base_of_config(base_kind: str, config: Any, seed: int) -> PreTrainedModel:
    """A random model of a config."""
    torch.manual_seed(seed)
    auto = transformers.AutoModelForSeq2SeqLM if base_kind in SEQ2SEQ else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, where no mistake about a bias would show
            parameter.data.normal_(std=0.1)
    return model


def make_checkpoint(
    method: str,
    base_kind: str,
    seed: int = 0,
    *,
    base: PreTrainedModel | None = None,
    change: Callable[[peft.PeftConfig], None] = lambda _config: None,
) -> tuple[CheckpointFiles, Any]:
    """The files of a random checkpoint of the method, and the peft model it was saved from, in eval mode.

    `change` may alter the config before the adapter is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about tied weights, saved embeddings, missing hub configs, seeds
        config = _METHODS[method](base_kind)
        config.task_type = "SEQ_2_SEQ_LM" if base_kind in SEQ2SEQ else "CAUSAL_LM"
        change(config)
        model = peft.get_peft_model(make_base(base_kind) if base is None else base, config)
        randomise(model, seed)
        return save(model), model.eval()


def randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if any(part in name for part in SOFT_SPOKEN):
            parameter.data = parameter.data + noise
        elif "lora_" in name and "magnitude" not in name:
            parameter.data = 0.3 * noise
        else:
            parameter.data = parameter.data + 0.2 * noise


def save(model: Any) -> CheckpointFiles:
    """What `save_pretrained` writes, as bytes; without the model card, which takes longer than all the rest."""
    model.create_or_update_model_card = lambda _folder: None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        where = Path(folder)
        return CheckpointFiles(config=(where / CONFIG_FILE).read_bytes(), weights=(where / WEIGHTS_FILE).read_bytes())


def first_task(model: Any) -> dict[str, torch.Tensor]:
    """The argument by which peft is asked for the first task of a checkpoint that holds several."""
    has_tasks = model.peft_config["default"].peft_type.value in ("MULTITASK_PROMPT_TUNING", "POLY")
    return {"task_ids": torch.tensor([0])} if has_tasks else {}


@torch.no_grad()
def oracle_logits(model: Any, ids: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
    """peft's logits of `ids` [1, T], of `decoder_ids` on an encoder-decoder; virtual tokens left out."""
    given = {"decoder_input_ids": decoder_ids} if model.config.is_encoder_decoder else {}
    given |= first_task(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits
    length = decoder_ids.shape[1] if model.config.is_encoder_decoder else ids.shape[1]
    return logits[:, -length:]
