"""Proof, at start, that running rows side by side gives what the model itself gives.

Two short prompts go through the model alone, before anything of it is replaced, and afterwards together and, but for
an encoder, in chunks. What is compared are logits, and the last hidden states of a model that generates nothing.
Every base is measured; how large a difference may be depends on the dtype alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_serve.core import RequestId, Row
from peft_serve.model.base import ResidentBase
from peft_serve.model.encoder_pass import EncoderPass
from peft_serve.model.families.family import ReadsStates
from peft_serve.model.passes import NothingInFront, Passes
from peft_serve.model.pools import KVPool, KVShape

_BLOCK_SIZE = 4
_NUM_BLOCKS = 5  # of each probe, enough for its 17 tokens at most


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt, and what the model itself makes of it: logits [tokens, V], or hidden states [tokens, d]."""

    source: tuple[int, ...]
    tokens: tuple[int, ...]
    own_TX: Tensor
    segments: tuple[int, ...] = ()


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding explains; rows that read the wrong positions are near 1."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 2e-1


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[Probe, ...]:
    """Ask the model itself, one prompt at a time."""
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    if not model.can_generate():
        return tuple(_probe_states(model, _ids(n, 3 * n + 2, vocab)) for n in (11, 6))
    probes = []
    for row, (num_source, num_tokens) in enumerate(((7, 11), (12, 6))):
        source = _ids(num_source, 5 * row + 1, vocab)
        tokens = _ids(num_tokens, 3 * row + 2, vocab)
        inputs = {"input_ids": torch.tensor([tokens], device=model.device)}
        if model.config.is_encoder_decoder:
            inputs = {
                "input_ids": torch.tensor([source], device=model.device),
                "decoder_input_ids": inputs["input_ids"],
            }
        logits = model(**inputs, use_cache=False).logits[0].float()
        probes.append(Probe(source if model.config.is_encoder_decoder else (), tokens, logits))
    return tuple(probes)


def _probe_states(model: PreTrainedModel, tokens: tuple[int, ...]) -> Probe:
    body = model.base_model
    inputs = {"input_ids": torch.tensor([tokens], device=model.device)}
    segments: tuple[int, ...] = ()
    has_segments = "token_type_ids" in inspect.signature(body.forward).parameters
    if has_segments and getattr(model.config, "type_vocab_size", 0) > 1:
        segments = tuple(int(i > len(tokens) // 2) for i in range(len(tokens)))
        inputs["token_type_ids"] = torch.tensor([segments], device=model.device)
    states = body(**inputs).last_hidden_state[0].float()
    return Probe((), tokens, states, segments)


@torch.inference_mode()
def difference(base: ResidentBase, probes: Sequence[Probe]) -> float:
    """The largest error of a token's values, relative to them: |ours - own| / |own| in the Euclidean norm.

    The maximum over tokens, not over single values, which in half precision are too noisy to judge by.
    """
    family = base.runs
    if base.shape.is_encoder:
        return _difference_of_rows(base, probes)
    pool = _pool(base, family.cache, len(probes))
    cross_pool = None if family.cross_cache is None else _pool(base, family.cross_cache, len(probes))
    passes = Passes(base, pool=pool, cross_pool=cross_pool)
    worst = 0.0
    done = [0] * len(probes)
    for chunks in ((5, 5), (5, 1), (1, 0)):
        running = [i for i, n in enumerate(chunks) if n]
        rows = [_row(i, probes[i], done[i], chunks[i]) for i in running]
        ours = _values(base, passes, rows)
        own = torch.cat([probes[i].own_TX[done[i] : done[i] + chunks[i]] for i in running])
        worst = max(worst, _worst(ours, own))
        for i in running:
            done[i] += chunks[i]
    assert done == [len(p.tokens) for p in probes], "every token of every probe is compared"
    return worst


def _values(base: ResidentBase, passes: Passes, rows: Sequence[Row]) -> Tensor:
    """What the rows' tokens came to, as the probes have it."""
    keep = {at: len(row.tokens) for at, row in enumerate(rows)} if base.shape.generates else {}
    nothing = NothingInFront()
    logits = passes.decode(rows, passes.encode(rows, nothing), keep, nothing)
    if logits is not None:
        return logits
    assert isinstance(base.runs, ReadsStates), "a model that generates nothing has states to read"
    return base.runs.states().float()


def _difference_of_rows(base: ResidentBase, probes: Sequence[Probe]) -> float:
    rows = [
        Row(
            request=RequestId(f"probe-{i}"),
            slot=0,
            tokens=(),
            start=0,
            blocks=(),
            source=given.tokens,
            num_source=len(given.tokens),
            segments=given.segments,
        )
        for i, given in enumerate(probes)
    ]
    each = EncoderPass(base, NothingInFront()).run(rows)
    return max(_worst(ours.states_SD.float(), given.own_TX) for ours, given in zip(each, probes, strict=True))


def _worst(ours_TX: Tensor, own_TX: Tensor) -> float:
    return float(((ours_TX - own_TX).norm(dim=-1) / own_TX.norm(dim=-1)).max())


def _row(index: int, given: Probe, start: int, num_tokens: int) -> Row:
    blocks = tuple(range(1 + index * _NUM_BLOCKS, 1 + (index + 1) * _NUM_BLOCKS))
    return Row(
        request=RequestId(f"probe-{index}"),
        slot=0,
        tokens=given.tokens[start : start + num_tokens],
        start=start,
        blocks=blocks,
        source=given.source if start == 0 else (),
        cross_blocks=blocks if given.source else (),
        num_source=len(given.source),
    )


def _ids(count: int, seed: int, vocab: int) -> tuple[int, ...]:
    return tuple((seed * 37 + 101 * i + 7) % vocab for i in range(count))


def _pool(base: ResidentBase, shape: KVShape, num_probes: int) -> KVPool:
    return KVPool(
        shape,
        num_blocks=1 + num_probes * _NUM_BLOCKS,
        block_size=_BLOCK_SIZE,
        dtype=base.dtype,
        device=base.device,
    )
