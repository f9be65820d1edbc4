"""How a compiled adapter lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.layout import ALIGNMENT, laid_out
from peft_serve.adapters.primitives import Adapter, Affine, LowRank, Rescaled, Rows
from peft_serve.core import AdapterId


def _adapter(*, stored: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(stored)

    vector, shared = drawn(5), (drawn(3, 9), drawn(8, 3))
    own = Rescaled("vera", *shared, drawn(3), drawn(8))
    return Adapter(
        id=AdapterId("sha256:1"),
        method="LORA",
        sites={
            "a": Affine(delta=LowRank(drawn(3, 9), drawn(8, 3)), shift=vector, maps=(own,)),
            "b": Affine(delta=LowRank(drawn(1, 9), drawn(8, 1)), out_scale=vector),
            "c": Affine(
                rows=Rows(torch.tensor([4, 2]), drawn(2, 9)), maps=(Rescaled("vera", *shared, drawn(3), drawn(8)),)
            ),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_one_piece_and_its_values_are_rounded_once(dtype: torch.dtype) -> None:
    given = _adapter()
    made = laid_out(given, dtype)
    for before, after in zip(given.tensors(), made.tensors(), strict=True):
        assert torch.equal(after, before.to(dtype) if before.is_floating_point() else before)
    shared = set(map(id, made.sites["a"].maps[0].factors))  # type: ignore[union-attr]
    inside = [t for t in made.tensors() if t.is_floating_point() and id(t) not in shared]
    (piece,) = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in inside}.values()
    assert piece.nbytes() < sum(t.nbytes for t in inside) + ALIGNMENT * len(inside)
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in inside)


def test_b_lies_turned_and_everything_else_as_it_is_seen() -> None:
    made = laid_out(_adapter(), torch.float32)
    turned = {id(edit.delta.b_OR) for edit in made.sites.values() if isinstance(edit, Affine) and edit.delta}
    assert len(turned) == 2
    for tensor in made.tensors():
        assert tensor.t().is_contiguous() if id(tensor) in turned else tensor.is_contiguous()


def test_what_is_shared_stays_shared_and_factors_of_many_adapters_are_not_in_the_piece() -> None:
    made = laid_out(_adapter(), torch.bfloat16)
    first, second, third = (made.sites[path] for path in "abc")
    assert isinstance(first, Affine)
    assert isinstance(second, Affine)
    assert isinstance(third, Affine)
    assert first.shift is second.out_scale
    assert first.maps[0].factors[0] is third.maps[0].factors[0]  # type: ignore[union-attr]
    for factor in first.maps[0].factors:  # type: ignore[union-attr]
        assert factor.untyped_storage().nbytes() == factor.nbytes


def test_a_file_is_not_kept_for_its_views() -> None:
    file = torch.randn(1000)
    edit = Affine(delta=LowRank(file[:6].view(2, 3), file[6:14].view(4, 2)))
    made = laid_out(Adapter(id=AdapterId("sha256:1"), method="LORA", sites={"a": edit}), torch.float32)
    assert sum(t.untyped_storage().nbytes() for t in list(made.tensors())[:1]) < file.untyped_storage().nbytes()
    assert not {t.untyped_storage().data_ptr() for t in made.tensors()} & {file.untyped_storage().data_ptr()}
