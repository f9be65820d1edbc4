"""Kernels run where their tensors are, which need not be torch's current device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import peft_serve
from peft_serve.kernels.triton.near import near

FOLDER = Path(peft_serve.__file__).parent / "kernels" / "triton"


class OnAGpu:
    """What `near` asks of a tensor."""

    is_cuda = True

    def __init__(self, number: int) -> None:
        self.device = torch.device("cuda", number)

    def get_device(self) -> int:
        return self.device.index


def test_another_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    def device(where: torch.device) -> AbstractContextManager[None]:
        entered.append(where)
        return near(torch.empty(0))  # type: ignore[return-value]  # does nothing

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    for number in (0, 1):
        with near(OnAGpu(number)):  # type: ignore[arg-type]
            pass
    assert entered == [torch.device("cuda:1")]


def launches(node: ast.AST, *, is_near: bool = False) -> Iterator[tuple[int, bool]]:
    """Lines in which a kernel is launched, `kernel[grid](...)`, and whether `near` is around it."""
    if isinstance(node, ast.With):
        is_near |= any(isinstance(i.context_expr, ast.Call) and _is_near(i.context_expr) for i in node.items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        yield node.lineno, is_near
    for child in ast.iter_child_nodes(node):
        yield from launches(child, is_near=is_near)


def _is_near(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "near"


def test_every_launch_is_near_its_tensors() -> None:
    found = {
        f"{path.name}:{line}": is_near
        for path in sorted(FOLDER.glob("*.py"))
        if not path.name.endswith(("_kernels.py", "_program.py"))  # which are run by the device
        for line, is_near in launches(ast.parse(path.read_text()))
    }
    assert len(found) >= 7
    assert [place for place, is_near in found.items() if not is_near] == []


def test_the_search_sees_a_launch_without() -> None:
    source = "with near(x):\n    k[1](x)\nk[2](x)\n"
    assert list(launches(ast.parse(source))) == [(2, True), (3, False)]
