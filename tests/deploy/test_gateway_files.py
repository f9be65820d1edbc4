"""The manifests for a gateway: they patch what is there, name each other, and ask routes that exist."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
import yaml

from peft_serve.config import Settings
from tests.conftest import REPOSITORY
from tests.deploy.conftest import Load
from tests.deploy.test_files import container, deployment, documents, image_environment

FOLDER = REPOSITORY / "deploy" / "kubernetes" / "gateway"


def kustomization() -> dict[str, Any]:
    (made,) = documents(FOLDER / "kustomization.yaml")
    return dict(made)


def made(kind: str, file: str) -> dict[str, Any]:
    (found,) = (each for each in documents(FOLDER / file) if each["kind"] == kind)
    return dict(found)


def patched() -> dict[str, Any]:
    """The deployment as kustomize makes it."""
    result = deployment()
    (patch,) = (each["patch"] for each in kustomization()["patches"] if each["target"]["kind"] == "Deployment")
    for change in yaml.safe_load(patch):
        *path, last = change["path"].strip("/").split("/")
        place: Any = result
        for step in path:
            place = place[int(step)] if step.isdigit() else place[step]
        assert change["op"] == "replace"
        assert type(place[last]) is type(change["value"]), change["path"]
        place[last] = change["value"]
    return result


def test_the_pool_is_the_deployments_pods_on_their_port() -> None:
    pool = made("InferencePool", "pool.yaml")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    labels = patched()["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert patched()["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels["llm-d.ai/engine-type"] == "vllm", "the picker reads vLLM's names"
    ports = {port["containerPort"] for port in container()["ports"]}
    assert (
        {port["number"] for port in pool["spec"]["targetPorts"]}
        == ports
        == {int(image_environment()["PEFT_SERVE_PORT"])}
    )


def test_the_picker_is_the_pools(load: Load) -> None:
    pool = made("InferencePool", "pool.yaml")
    service, picker = made("Service", "picker.yaml"), made("Deployment", "picker.yaml")
    reference = pool["spec"]["endpointPickerRef"]
    assert reference["name"] == service["metadata"]["name"]
    assert reference["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
    template = picker["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (running,) = template["spec"]["containers"]
    assert f"--pool-name={pool['metadata']['name']}" in running["args"]
    assert f"--pool-group={pool['apiVersion'].split('/')[0]}" in running["args"]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in running["ports"]}
    config = made("ConfigMap", "picker.yaml")
    (file,) = config["data"]
    assert f"--config-file={running['volumeMounts'][0]['mountPath']}/{file}" in running["args"]
    plugins = yaml.safe_load(config["data"][file])
    (source,) = (each for each in plugins["plugins"] if each["type"] == "metrics-data-source")
    assert source["parameters"]["path"] in load.routes
    (profile,) = plugins["schedulingProfiles"]
    assert {each["pluginRef"] for each in profile["plugins"]} <= {each["type"] for each in plugins["plugins"]}
    assert (
        template["spec"]["terminationGracePeriodSeconds"]
        > patched()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    )


def test_routes_by_model_go_to_the_pool_and_all_others_to_the_service(load: Load) -> None:
    by_model, others = made("HTTPRoute", "route.yaml")["spec"]["rules"]
    paths = {each["path"]["value"] for each in by_model["matches"]}
    assert paths <= load.routes
    assert all(each["path"]["type"] == "Exact" for each in by_model["matches"])
    (backend,) = by_model["backendRefs"]
    pool = made("InferencePool", "pool.yaml")
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])
    assert backend["group"] == pool["apiVersion"].split("/")[0]
    (backend,) = others["backendRefs"]
    (service,) = documents(FOLDER.parent / "base" / "service.yaml")
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}


def test_several_servers_share_nothing_that_one_of_them_writes() -> None:
    spec = patched()["spec"]
    assert spec["replicas"] >= 2
    pod = spec["template"]["spec"]
    (running,) = pod["containers"]
    mounted = {each["name"]: each for each in running["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    (claim,) = documents(FOLDER / "adapters.yaml")
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"], "readOnly": True}
            assert mounted[volume["name"]]["readOnly"] is True
    options = running["args"][1:]
    assert {option[2:].replace("-", "_") for option in options[::2]} <= set(Settings.model_fields)
    assert set(options[1::2]) <= {each["mountPath"] for each in running["volumeMounts"]}


def test_the_policy_lets_the_picker_and_the_gateway_in() -> None:
    (patch,) = (each["patch"] for each in kustomization()["patches"] if each["target"]["kind"] == "NetworkPolicy")
    ((change),) = yaml.safe_load(patch)
    picker, gateway = change["value"]["from"]
    labels = made("Deployment", "picker.yaml")["spec"]["template"]["metadata"]["labels"]
    assert picker["podSelector"]["matchLabels"].items() <= labels.items()
    (parent,) = made("HTTPRoute", "route.yaml")["spec"]["parentRefs"]
    assert gateway["podSelector"]["matchLabels"] == {"gateway.networking.k8s.io/gateway-name": parent["name"]}
    assert change["value"]["ports"][0]["port"] in {port["name"] for port in container()["ports"]}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_puts_it_together() -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True)
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert ("PersistentVolumeClaim", "peft-serve") not in found, "no volume that one server uses at a time"
    assert (
        found["Deployment", "peft-serve"]["spec"]["template"]["spec"]["volumes"]
        == (patched()["spec"]["template"]["spec"]["volumes"])
    )
    assert len(found["NetworkPolicy", "peft-serve"]["spec"]["ingress"]) == 2
