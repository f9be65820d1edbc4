"""What must be the same after every attack: each bit of the base, and what a fixed request is answered."""

from __future__ import annotations

import hashlib

import torch

from tests.adapters.fake_base import FakeBase, adapted_logits
from tests.attacks.trials import Subject

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
NUM_NEW = 4


def fingerprint(base: FakeBase) -> str:
    """A digest of every bit of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in base.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def golden_row(subject: Subject) -> tuple[int, ...]:
    """Token ids by greedy choice, those of the base first and those of the honest adapter behind them."""
    ids = base_ids = PROMPT
    for _ in range(NUM_NEW):
        chosen = adapted_logits(subject.base, subject.adapter, ids, PROMPT)[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, chosen], dim=1)
        plain = subject.base.model(input_ids=base_ids).logits[:, -1:].argmax(dim=-1)
        base_ids = torch.cat([base_ids, plain], dim=1)
    return (*base_ids[0].tolist(), *ids[0].tolist())
