"""The files under deploy/: they parse, name files that exist, and agree with the server they start."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_serve.config import Settings
from tests.conftest import REPOSITORY
from tests.deploy.conftest import Load

DEPLOY = REPOSITORY / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
PREFIX = "PEFT_SERVE_"


def documents(path: Path) -> list[Any]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


def deployment() -> dict[str, Any]:
    (made,) = documents(BASE / "deployment.yaml")
    return dict(made)


def pod() -> dict[str, Any]:
    return dict(deployment()["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (made,) = pod()["containers"]
    return dict(made)


def settings_in(environment: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)}


def image_environment() -> dict[str, str]:
    lines = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    last = [line for line in lines if line.startswith("ENV")][-1]
    return dict(word.split("=", 1) for word in shlex.split(last)[1:])


def mounts(compose: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, service in compose["services"].items():
        for volume in service.get("volumes", ()):
            yield name, volume.split(":")[0]


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=str)
def test_every_yaml_file_parses_and_explains_itself_in_ascii(path: Path) -> None:
    assert documents(path)
    assert path.read_text().isascii()
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_what_compose_mounts_and_builds_is_there() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    named = set(compose["volumes"])
    seen = list(mounts(compose))
    assert len(seen) == 6
    for service, source in seen:
        assert source in named or (DEPLOY / source).exists(), (service, source)
    assert (DEPLOY / compose["services"]["peft-serve"]["build"] / "Dockerfile").is_file()
    for service in compose["services"].values():
        assert ":" in service["image"] or "build" in service, "a version is named, or it is built here"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_starts_the_server_with_options_that_exist() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    server = compose["services"]["peft-serve"]
    options = [word.removeprefix("--").replace("-", "_") for word in server["command"] if word.startswith("--")]
    assert options
    assert set(options) <= set(Settings.model_fields)
    settings = Settings()
    assert int(server["stop_grace_period"].removesuffix("s")) > settings.drain_s + settings.drain_delay_s


def test_the_documents_name_files_that_are_there() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    named = set(re.findall(r"\bdeploy/[\w./-]*\w", text))
    assert len(named) >= 5
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_prometheus_scrapes_the_server_and_reads_the_alerts() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yaml")
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "peft-serve", "the alerts select it"
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose["services"]
    assert port == image_environment()["PEFT_SERVE_PORT"]
    assert [(DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"]] == [True]


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    provisioning = DEPLOY / "grafana" / "provisioning"
    (sources,) = documents(provisioning / "datasources" / "prometheus.yaml")
    (providers,) = documents(provisioning / "dashboards" / "peft-serve.yaml")
    (source,) = sources["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose["services"]
    grafana = compose["services"]["grafana"]
    inside = {volume.split(":")[1]: DEPLOY / volume.split(":")[0] for volume in grafana["volumes"] if "./" in volume}
    folder = inside[providers["providers"][0]["options"]["path"]]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert json.loads((folder / Path(home).name).read_text())["uid"] == "peft-serve"


@pytest.mark.parametrize("folder", ["base", "gpu", "gateway", "shared-store"])
def test_what_kustomize_puts_together_is_there(folder: str) -> None:
    (made,) = documents(DEPLOY / "kubernetes" / folder / "kustomization.yaml")
    for resource in made["resources"]:
        assert (DEPLOY / "kubernetes" / folder / resource).exists()


def test_the_gpu_patch_meets_fields_that_are_there() -> None:
    (made,) = documents(DEPLOY / "kubernetes" / "gpu" / "kustomization.yaml")
    for change in yaml.safe_load(made["patches"][0]["patch"]):
        place: Any = deployment()
        for step in change["path"].strip("/").split("/"):
            place = place[int(step)] if step.isdigit() else place[step]
        assert change["op"] == "replace"
        assert type(place) is type(change["value"])


def test_probes_ask_routes_that_exist(load: Load) -> None:
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports["http"] == int(image_environment()["PEFT_SERVE_PORT"])
    asked = {kind: container()[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    for probe in asked.values():
        assert probe["path"] in load.routes
        assert probe["port"] in ports
    assert asked["readiness"]["path"] == "/readyz", "it says 503 while the server drains"
    assert asked["liveness"]["path"] == "/health", "it says 503 when a step hangs, and 200 while the server drains"
    annotations = deployment()["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in load.routes
    startup = container()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600, "a large base takes minutes to load"


def test_what_runs_is_finished_before_the_pod_is_killed() -> None:
    settings = Settings(**settings_in({each["name"]: each["value"] for each in container()["env"]}))  # type: ignore[arg-type]
    command = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    needed_s = float(command[1]) + settings.drain_delay_s + settings.drain_s
    assert pod()["terminationGracePeriodSeconds"] > needed_s + 10
    readiness = container()["readinessProbe"]
    seen_s = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert seen_s <= float(command[1]) + settings.drain_delay_s, "the load balancer sees it go"


def test_the_pods_settings_are_settings() -> None:
    given = settings_in(image_environment()) | settings_in({each["name"]: each["value"] for each in container()["env"]})
    assert set(given) <= set(Settings.model_fields)
    assert pod()["enableServiceLinks"] is False, "or the service's own variables would be taken for settings"


def test_the_pod_can_write_where_the_image_writes_and_nowhere_else() -> None:
    security = container()["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert f"--uid {pod()['securityContext']['runAsUser']} " in (REPOSITORY / "Dockerfile").read_text()
    mounted = {each["mountPath"]: each["name"] for each in container()["volumeMounts"]}
    assert {"/data", "/tmp"} == set(mounted)
    assert set(mounted.values()) == {volume["name"] for volume in pod()["volumes"]}
    written = [image_environment()[name] for name in ("PEFT_SERVE_STORE", "HF_HOME")]
    assert all(path.startswith("/data/") for path in written)
    claimed = next(volume for volume in pod()["volumes"] if "persistentVolumeClaim" in volume)
    (claim,) = documents(BASE / "store.yaml")
    assert claimed["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_service_policy_and_autoscaler_mean_this_deployment() -> None:
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    (service,) = documents(BASE / "service.yaml")
    (policy,) = documents(BASE / "network-policy.yaml")
    (scaler,) = documents(BASE / "autoscaler.yaml")
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["spec"]["ingress"][0]["ports"][0]["port"] == "http"
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment()["metadata"]["name"]
    assert deployment()["spec"]["strategy"]["type"] == "Recreate", "the store is one server's at a time"
