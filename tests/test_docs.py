"""The documents say everything there is: every option, metric, error code and route."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from peft_serve import errors
from peft_serve.config import Settings
from peft_serve.metrics import Metrics


def _read(repository: Path, name: str) -> str:
    return (repository / "docs" / name).read_text()


@pytest.mark.parametrize("name", [n for n in Settings.model_fields if n != "model"])
def test_every_option_is_documented(repository: Path, name: str) -> None:
    assert f"`--{name.replace('_', '-')}`" in _read(repository, "operations.md")


def test_every_documented_option_exists(repository: Path) -> None:
    named = set(re.findall(r"`--([a-z-]+)`", _read(repository, "operations.md")))
    options = {n.replace("_", "-") for n in Settings.model_fields}
    switches = {f"no-{n.replace('_', '-')}" for n, field in Settings.model_fields.items() if field.annotation is bool}
    assert named <= options | switches


def test_every_metric_is_documented(repository: Path) -> None:
    text = _read(repository, "operations.md")
    families = re.findall(r"^# TYPE (\S+) (\w+)$", Metrics().render().decode(), re.MULTILINE)
    assert len(families) > 20
    missing = [name for name, kind in families if not name.endswith("_created") and name not in text]
    assert not missing


def test_every_error_code_is_documented(repository: Path) -> None:
    text = _read(repository, "http-api.md")
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.ServeError)]
    for error in classes:
        assert f"`{error.code}`" in text, error.__name__
        assert str(error.status) in text, error.__name__


def test_every_class_stands_in_the_error_tree() -> None:
    tree = inspect.getdoc(errors) or ""
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.ServeError):
            assert name in tree


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *[f"docs/{n}" for n in ("design.md", "http-api.md")]])
def test_relative_links_lead_somewhere(repository: Path, page: str) -> None:
    path = repository / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_no_document_names_a_place_outside_the_repository(repository: Path) -> None:
    pages = [*repository.glob("*.md"), *repository.glob("docs/**/*.md"), *repository.glob("adapters/**/*.md")]
    assert len(pages) >= 8
    for page in pages:
        assert not re.search(r"\.\./shared|/work/|/root/|/tmp/", page.read_text()), page
