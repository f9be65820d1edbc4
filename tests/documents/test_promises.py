"""The page of promises names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = "docs/explanation/promises.md"
LINK = re.compile(r"\]\((?P<path>[^)#]*tests/[^)]*)\)(?: `(?P<test>test_\w+)`)?")


def rows(repository: Path) -> dict[str, str]:
    """Each promise's row."""
    lines = (repository / PAGE).read_text().splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| P")}


def test_there_are_fourteen(repository: Path) -> None:
    assert list(rows(repository)) == [f"P{number}" for number in range(1, 15)]


@pytest.mark.parametrize("promise", [f"P{number}" for number in range(1, 15)])
def test_each_is_held_by_tests_that_there_are(promise: str, repository: Path) -> None:
    links = list(LINK.finditer(rows(repository)[promise]))
    assert any(link["test"] for link in links)
    for link in links:
        file = (repository / PAGE).parent / link["path"]
        assert file.is_file(), link["path"]
        assert link["test"] is None or f"def {link['test']}(" in file.read_text(), link["test"]
