"""Lists reach the device as they are, by themselves or together."""

from __future__ import annotations

import torch

from peft_serve.model.sending import packed, sent

CPU = torch.device("cpu")


def test_lists_that_travel_together_arrive_as_if_alone() -> None:
    lists = [[3, 1, 2], [], [1 << 40], [0, 0]]
    alone, together = sent(lists, CPU), packed(lists, CPU, pin=False)
    assert [each.tolist() for each in together] == [each.tolist() for each in alone] == lists
    assert {each.dtype for each in (*alone, *together)} == {torch.int64}
