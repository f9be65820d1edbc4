"""Dashboard and alerts: each expression names series, labels and values that a running server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.deploy.conftest import Load
from tests.deploy.promql import parsed

DEPLOY = REPOSITORY / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/peft-serve.json").read_text())
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
OF_PROMETHEUS = {"up"}
OF_GRAFANA = {"$instance", "$__all"}
RATES = {"rate", "increase", "irate"}
OVER_RANGES = RATES | {"deriv", "changes", "delta", "max_over_time"}
NOT_LIVE = {("outcome", "failed")}  # labels of series that begin with the first failure


def expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}: {target['refId']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]
    for rule in ALERTS:
        yield f"alert {rule['alert']}", rule["expr"]


EXPRESSIONS = dict(expressions())


def test_there_is_something_to_check() -> None:
    assert len(EXPRESSIONS) > 70
    assert len(ALERTS) >= 10


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_an_expression_reads_what_a_server_tells(load: Load, place: str) -> None:
    query = parsed(EXPRESSIONS[place])
    assert query.selectors
    known: set[str] = {"le"}
    for selector in query.selectors:
        if selector.name in OF_PROMETHEUS:
            known |= {"instance", "job"}
            continue
        assert selector.name in load.after.samples, selector.name
        labels = load.after.labels(selector.name)
        known |= labels
        for label, sign, value in selector.matchers:
            assert label in labels, f"{selector.name} has no label {label}"
            if sign == "=" and label != "job" and (label, value) not in NOT_LIVE:
                assert value in load.after.values(selector.name, label), f'{selector.name}{{{label}="{value}"}}'
            if sign == "=~":
                assert value in OF_GRAFANA
    assert query.grouped <= known, query.grouped - known


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_counters_are_read_as_rates_and_gauges_as_they_are(load: Load, place: str) -> None:
    query = parsed(EXPRESSIONS[place])
    for selector in query.selectors:
        kind = load.after.types.get(selector.name, "gauge")
        is_counted = kind in ("counter", "histogram")
        assert selector.has_range == (selector.function in OVER_RANGES), selector
        assert is_counted == (selector.function in RATES), selector
    if "histogram_quantile" in query.functions:
        assert "le" in query.grouped
        assert all(selector.name.endswith("_bucket") for selector in query.selectors)


@pytest.mark.parametrize("place", [place for place in EXPRESSIONS if place.startswith("panel")])
def test_every_panel_heeds_the_choice_of_servers(place: str) -> None:
    for selector in parsed(EXPRESSIONS[place]).selectors:
        assert ("instance", "=~", "$instance") in selector.matchers


def test_the_parser_sees_what_is_wrong() -> None:
    query = parsed('sum by (a, b) (rate(x_total{c="d", e=~"f"}[5m])) / on (g) y > 0.5 and z')
    assert [(s.name, s.has_range, s.function) for s in query.selectors] == [
        ("x_total", True, "rate"), ("y", False, None), ("z", False, None),
    ]  # fmt: skip
    assert query.selectors[0].matchers == (("c", "=", "d"), ("e", "=~", "f"))
    assert query.grouped == {"a", "b", "g"}
    for wrong in ("rate(x[5m]", "x)", "x ? y"):
        with pytest.raises(ValueError, match=r"parenthesis|PromQL"):
            parsed(wrong)


def test_legends_name_labels_that_are_left(load: Load) -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            query = parsed(target["expr"])
            left = set(query.grouped)
            if not query.functions & {"sum", "min", "max", "histogram_quantile", "topk"}:
                left |= load.after.labels(query.selectors[0].name)
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left, target


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + i, grid["y"] + j) for i in range(grid["w"]) for j in range(grid["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_dashboard_asks_the_data_source_that_is_chosen() -> None:
    names = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert names["datasource"]["type"] == "datasource"
    assert names["instance"]["query"]["query"] == "label_values(peft_serve_build_info, instance)"
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(repository: Path, rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")
    assert f"`{rule['alert']}`" in (repository / "docs/operations.md").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_prometheus_reads_its_files() -> None:
    for what, name in (("rules", "alerts.yaml"), ("config", "prometheus.yaml")):
        subprocess.run(["promtool", "check", what, DEPLOY / "prometheus" / name], check=True, capture_output=True)
