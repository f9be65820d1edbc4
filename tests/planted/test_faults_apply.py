"""Every planted fault still has its place in the code, and its tests are there. `make planted` plants them."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from tests.planted.faults import FAULTS, Fault
from tests.planted.planting import Colour, Planting, planted, run_all


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_a_fault_occurs_once_and_python_still_reads_it(fault: Fault, repository: Path) -> None:
    text = (repository / "server" / "peft_serve" / fault.file).read_text()
    changed = planted(text, fault)
    assert changed != text
    ast.parse(changed)
    assert fault.tests
    for path in fault.tests[: fault.tests.index("-k")] if "-k" in fault.tests else fault.tests:
        assert (repository / path).exists()


def test_there_are_enough_and_none_twice() -> None:
    assert len(FAULTS) >= 20
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_a_fault_without_its_place_says_so() -> None:
    fault = replace(FAULTS[0], old="there is no such line")
    with pytest.raises(ValueError, match=r"occurs 0 times in adapters/store.py; write the fault"):
        planted("a = 1\n", fault)


def tree(root: Path) -> Path:
    """A project of one line, and its test."""
    (root / "server" / "peft_serve").mkdir(parents=True)
    (root / "server" / "peft_serve" / "__init__.py").write_text("two = 1 + 1\n")
    (root / "tests").mkdir()
    test = "from peft_serve import two\n\ndef test_two():\n    assert two == 2\n"
    (root / "tests" / "test_two.py").write_text(test)
    return root


def test_what_the_tests_say_is_told_by_its_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # most of the time of a run of one line
    root = tree(tmp_path / "root")
    (tmp_path / "copy").mkdir()
    planting = Planting(root, tmp_path / "copy")
    wrong = Fault(name="wrong", file="__init__.py", old="1 + 1", new="1 + 2", tests=("tests/test_two.py",))
    said: list[str] = []
    assert run_all(planting, [wrong], said.append)
    assert [line.split()[0] for line in said] == ["without", "red"]
    harmless, unreadable = replace(wrong, new="3 - 1"), replace(wrong, new="1 +")
    assert planting.plant(harmless).colour is Colour.GREEN
    assert planting.plant(unreadable).colour is Colour.BROKEN
    assert not run_all(planting, [harmless], said.append)
    assert (root / "server" / "peft_serve" / "__init__.py").read_text() == "two = 1 + 1\n"
