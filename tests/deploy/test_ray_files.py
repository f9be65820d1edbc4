"""The files for Ray Serve: settings that exist, with values that they take, for the builder that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_serve.cluster.plan import Layout
from peft_serve.config import Settings
from tests.deploy.test_files import container
from tests.deploy.test_files import pod as one_server

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


def cluster(repository: Path) -> dict[str, Any]:
    service = yaml.safe_load((repository / "deploy" / "ray" / "rayservice.yaml").read_text())
    return dict(service["spec"]["rayClusterConfig"])


def pods(repository: Path) -> Iterator[dict[str, Any]]:
    """The head's and the workers'."""
    made = cluster(repository)
    for group in (made["headGroupSpec"], *made["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_who_reaches_a_port_of_ray_needs_the_clusters_token(repository: Path) -> None:
    made = cluster(repository)
    assert made["authOptions"] == {"mode": "token"}, "the operator has to know it too: it deploys by the dashboard"
    assert "dashboard-host" not in made["headGroupSpec"]["rayStartParams"], "and it asks from another pod"
    for pod in pods(repository):
        (running,) = pod["containers"]
        assert not {each["name"] for each in running["env"]} & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_a_pod_of_ray_ends_what_runs_before_it_goes(repository: Path) -> None:
    (application,) = applications(repository / "deploy" / "ray" / "rayservice.yaml")
    settings = Settings(**{key: value for key, value in application["args"].items() if key in Settings.model_fields})
    for pod in pods(repository):
        (running,) = pod["containers"]
        command, seconds = running["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        assert settings.drain_delay_s + settings.drain_s < float(seconds) < pod["terminationGracePeriodSeconds"] - 10


def test_a_pod_of_ray_is_as_closed_as_that_of_one_server(repository: Path) -> None:
    for pod in pods(repository):
        (running,) = pod["containers"]
        assert pod["securityContext"] == one_server()["securityContext"]
        assert running["securityContext"] == container()["securityContext"]
        assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
        mounted = {each["mountPath"]: each["name"] for each in running["volumeMounts"]}
        assert {"/tmp", "/data", "/store"} == set(mounted), "Ray writes to /tmp, the hub's cache is in /data"
        assert set(mounted.values()) == {volume["name"] for volume in pod["volumes"]}
        environment = {each["name"]: each["value"] for each in running["env"]}
        assert environment["XDG_CACHE_HOME"] in mounted


def test_the_image_is_the_one_that_is_built_here_and_has_ray(repository: Path) -> None:
    assert {pod["containers"][0]["image"] for pod in pods(repository)} == {container()["image"]}
    dockerfile = (repository / "Dockerfile").read_text()
    assert "install -r requirements.lock" in dockerfile
    locked = dict(line.split("==") for line in (repository / "requirements.lock").read_text().splitlines())
    assert {"ray", "obstore"} <= set(locked)
    assert cluster(repository)["rayVersion"] == locked["ray"], "the operator asks as this version is asked"
    runs = dockerfile.rsplit("\nFROM ", 1)[1]
    assert "wget" in runs.split("apt-get install", 1)[1].split("&&", 1)[0].split(), "KubeRay's probes call it"
