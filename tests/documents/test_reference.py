"""The pages that are made from the code say what the code says."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from peft_serve.cluster.figures import PlacingFigures
from peft_serve.config import Settings
from peft_serve.metrics import Metrics
from tests.documents.reference import FOLDER, PAGES, TAGS, openapi_document


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_code_says(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run: python -m tests.documents.reference write"


def test_no_route_is_left_out() -> None:
    page = (FOLDER / "routes.md").read_text()
    paths = openapi_document()["paths"]
    assert len(paths) > 25
    for path, operations in paths.items():
        for verb, operation in operations.items():
            assert f"`{verb.upper()} {path}`" in page
            assert set(operation["tags"]) <= set(TAGS), f"{path}: a tag without a section"


def test_every_setting_and_every_metric_has_a_row() -> None:
    options, metrics = ((FOLDER / name).read_text() for name in ("options.md", "metrics.md"))
    for name in Settings.model_fields.keys() - {"model"}:
        assert f"| `--{name.replace('_', '-')}` |" in options
    registry = CollectorRegistry()
    PlacingFigures(registry)
    pages = Metrics().render().decode() + generate_latest(registry).decode()
    families = [line.split()[2] for line in pages.splitlines() if line.startswith("# TYPE")]
    assert "peft_serve_replicas" in families
    assert len(families) > 20
    for name in families:
        assert f"`{name}`" in metrics or name.startswith("process_") or name.endswith("_created")
