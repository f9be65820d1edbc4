"""The files for Ray Serve: settings that exist, with values that they take, for the builder that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_serve.cluster.plan import Layout
from peft_serve.config import Settings

FILES = ("serve.yaml", "rayservice.yaml")


def applications(file: Path) -> Iterator[dict[str, Any]]:
    """Those that Ray Serve is to run."""
    found = yaml.safe_load(file.read_text())
    if found.get("kind") == "RayService":
        found = yaml.safe_load(found["spec"]["serveConfigV2"])
    yield from found["applications"]


@pytest.mark.parametrize("name", FILES)
def test_settings_of_a_serve_config_are_those_of_the_server(name: str, repository: Path) -> None:
    (application,) = applications(repository / "deploy" / "ray" / name)
    assert application["import_path"] == "peft_serve.cluster.deployments:app"
    args = application["args"]
    layout = Layout(**{key: value for key, value in args.items() if key in Layout.model_fields})
    settings = Settings(**{key: value for key, value in args.items() if key not in Layout.model_fields})
    layout.require_possible(settings)
    assert (layout.min_replicas, layout.max_replicas) == (2, 8)
    assert settings.store == args["store"]


def test_clusters_that_replace_each_other_share_their_store(repository: Path) -> None:
    (application,) = applications(repository / "deploy" / "ray" / "rayservice.yaml")
    assert application["args"]["store_shared"] is True


def test_pods_ask_for_the_clusters_token(repository: Path) -> None:
    service = yaml.safe_load((repository / "deploy" / "ray" / "rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        given = {each["name"]: each for each in container["env"]}
        assert given["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in given["RAY_AUTH_TOKEN"]["valueFrom"]
