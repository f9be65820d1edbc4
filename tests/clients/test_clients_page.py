"""Every block of Python on the page about clients runs as it stands, but for the address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
BLOCKS = re.findall(r"^## (\S+)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_every_client_has_a_block() -> None:
    headings = re.findall(r"^## (\S+)", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in BLOCKS] == headings
    assert len(headings) == 7


@pytest.mark.usefixtures("online")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_block_runs(name: str, block: str, url: str) -> None:
    for module in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(module)
    said: dict[str, object] = {}
    exec(compile(block.replace("http://localhost:8000", url), f"{PAGE.name}: {name}", "exec"), said)
    answers = [said[word] for word in ("text", "chat", "vector", "pieces") if word in said]
    assert answers
    assert all(answer is not None and len(str(answer)) > 0 for answer in answers)
