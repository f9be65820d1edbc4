"""The table of methods says what is registered and what was measured."""

from __future__ import annotations

import json

from peft_serve.adapters.methods import METHODS
from tests.adapters.checkpoints import methods_for
from tests.documents.formats_table import KINDS, MEASURED, NO_FORWARD, PAGE, TERMS, with_table


def test_page_holds_the_table() -> None:
    page = PAGE.read_text()
    assert with_table(page, json.loads(MEASURED.read_text())) == page, (
        "run: python -m tests.documents.formats_table write"
    )


def test_every_method_was_measured() -> None:
    measured = json.loads(MEASURED.read_text())
    for kind in KINDS:
        wanted = [name for name in methods_for(kind) if (kind, name) not in NO_FORWARD]
        missing = [name for name in wanted if kind not in measured.get(name, {}).get("difference", {})]
        assert not missing, "run: python -m tests.documents.formats_table measure"
    assert {entry["peft_type"] for entry in measured.values()} == set(METHODS)
    assert all(term in TERMS for entry in measured.values() for term in entry["terms"])


def test_measured_differences_are_rounding() -> None:
    for name, entry in json.loads(MEASURED.read_text()).items():
        for kind, difference in entry["difference"].items():
            assert difference <= 2e-4 if kind == "t5" else difference <= 1e-5, (name, kind)
