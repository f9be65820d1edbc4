"""Proof, at start, that running rows side by side gives what the model itself gives.

Two short prompts go through the model alone, before anything of it is replaced, and afterwards together and in
chunks. Every base is measured; how large a difference may be depends on the dtype alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_serve.core import RequestId, Row
from peft_serve.model.base import ResidentBase
from peft_serve.model.passes import Passes
from peft_serve.model.pools import KVPool, KVShape

_BLOCK_SIZE = 4
_NUM_BLOCKS = 5  # of each probe, enough for its 17 tokens at most


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt, and the model's own logits [tokens, V] for it."""

    source: tuple[int, ...]
    tokens: tuple[int, ...]
    logits_TV: Tensor


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding explains; rows that read the wrong positions are near 1."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 2e-1


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[Probe, ...]:
    """Ask the model itself, one prompt at a time."""
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
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


@torch.inference_mode()
def difference(base: ResidentBase, probes: Sequence[Probe]) -> float:
    """The largest error of a token's logits, relative to them: |ours - own| / |own| in the Euclidean norm.

    The maximum over tokens, not over single logits, which in half precision are too noisy to judge by.
    """
    family = base.runs
    pool = _pool(base, family.cache, len(probes))
    cross_pool = None if family.cross_cache is None else _pool(base, family.cross_cache, len(probes))
    passes = Passes(base, pool=pool, cross_pool=cross_pool)
    worst = 0.0
    done = [0] * len(probes)
    for chunks in ((5, 5), (5, 1), (1, 0)):
        running = [i for i, n in enumerate(chunks) if n]
        rows = [_row(i, probes[i], done[i], chunks[i]) for i in running]
        keep = {at: len(row.tokens) for at, row in enumerate(rows)}
        logits = passes.decode(rows, passes.encode(rows, lambda _: None), keep)
        assert logits is not None, "logits of every token were asked for"
        own = torch.cat([probes[i].logits_TV[done[i] : done[i] + chunks[i]] for i in running])
        worst = max(worst, float(((logits - own).norm(dim=-1) / own.norm(dim=-1)).max()))
        for i in running:
            done[i] += chunks[i]
    assert done == [len(p.tokens) for p in probes], "every token of every probe is compared"
    return worst


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
