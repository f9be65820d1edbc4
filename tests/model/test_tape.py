"""The tape that takes a CUDA graph's place refuses what a capture refuses, and keeps what a graph keeps."""

from __future__ import annotations

import pytest
import torch

from tests.model.tape import GoneError, HostAskedError, Tape

pytest.importorskip("triton", reason="Triton is not installed")


def test_a_tape_tells_of_what_a_capture_does_not_allow() -> None:
    x = torch.arange(4.0)
    with Tape(), pytest.raises(HostAskedError, match="_local_scalar_dense"):
        float(x[0])
    with Tape(), pytest.raises(HostAskedError, match="lift"):
        torch.tensor([1, 2])
    with Tape(), pytest.raises(HostAskedError, match="truth"):
        x[x > 1]
    with Tape(), pytest.raises(HostAskedError, match="truth"):
        x.index_put_((x > 1,), x[:1])
    with Tape(), pytest.raises(HostAskedError, match="repeats"):
        x.repeat_interleave(torch.ones(4, dtype=torch.int64))


def test_a_tape_tells_of_what_it_reads_and_nobody_keeps() -> None:
    kept, out = torch.ones(3), torch.zeros(3)
    with Tape() as tape:
        out.copy_(kept * 2)
    kept.fill_(4)
    tape.play()
    assert out.tolist() == [8] * 3
    del kept
    with pytest.raises(GoneError, match="in memory no longer"):
        tape.play()
