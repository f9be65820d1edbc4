"""The manifests for servers over one bucket: settings that exist, a place to write, and a way to the store."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from peft_serve.config import Settings
from tests.conftest import REPOSITORY
from tests.deploy.test_files import deployment, documents, image_environment, settings_in

FOLDER = REPOSITORY / "deploy" / "kubernetes" / "shared-store"


def patches(kind: str) -> list[dict[str, Any]]:
    (made,) = documents(FOLDER / "kustomization.yaml")
    (patch,) = (each["patch"] for each in made["patches"] if each["target"]["kind"] == kind)
    return list(yaml.safe_load(patch))


def patched(found: dict[str, Any], kind: str) -> dict[str, Any]:
    """The document as kustomize makes it."""
    for change in patches(kind):
        *path, last = change["path"].strip("/").split("/")
        place: Any = found
        for step in path:
            place = place[int(step)] if step.isdigit() else place[step]
        if change["op"] == "add" and last == "-":
            place.append(change["value"])
        elif change["op"] == "add":
            assert last not in place, f"{change['path']} is there: replace it"
            place[last] = change["value"]
        else:
            key = int(last) if last.isdigit() else last
            assert change["op"] == "replace"
            assert type(place[key]) is type(change["value"]), change["path"]
            place[key] = change["value"]
    return found


def environment() -> dict[str, str]:
    (running,) = patched(deployment(), "Deployment")["spec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in running["env"]}


def policy() -> dict[str, Any]:
    (made,) = documents(FOLDER.parent / "base" / "network-policy.yaml")
    return patched(dict(made), "NetworkPolicy")


def test_several_servers_have_one_store_and_share_no_disk() -> None:
    spec = patched(deployment(), "Deployment")["spec"]
    assert spec["replicas"] > 1
    assert spec["strategy"]["type"] == "RollingUpdate"
    names = [volume["name"] for volume in spec["template"]["spec"]["volumes"]]
    assert not [volume for volume in spec["template"]["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    (running,) = spec["template"]["spec"]["containers"]
    assert {each["name"] for each in running["volumeMounts"]} == set(names)
    assert [each["secretRef"]["name"] for each in running["envFrom"]] == ["peft-serve-store"]
    settings = Settings(**settings_in(environment()))  # type: ignore[arg-type]
    assert (settings.store or "").startswith("s3://")


def test_what_is_compiled_goes_where_the_pod_can_write() -> None:
    (running,) = patched(deployment(), "Deployment")["spec"]["template"]["spec"]["containers"]
    mounted = {each["mountPath"] for each in running["volumeMounts"]}
    assert running["securityContext"]["readOnlyRootFilesystem"] is True
    assert environment()["HOME"] in mounted, "a store in a bucket compiles to ~/.local/share"
    assert environment()["XDG_CACHE_HOME"] in mounted
    assert any(image_environment()["HF_HOME"].startswith(f"{path}/") for path in mounted)


def test_the_policy_lets_the_servers_reach_the_store() -> None:
    endpoint = urlsplit(environment()["AWS_ENDPOINT"])
    assert (endpoint.scheme == "http") == (environment()["AWS_ALLOW_HTTP"] == "true")
    rule = policy()["spec"]["egress"][-1]
    assert [port["port"] for port in rule["ports"]] == [endpoint.port]
    assert [each["podSelector"]["matchLabels"]["app"] for each in rule["to"]] == [endpoint.hostname]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_makes_the_same_of_it() -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True)
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert ("PersistentVolumeClaim", "peft-serve") not in found, "no volume that one server uses at a time"
    ours, theirs = patched(deployment(), "Deployment")["spec"], found["Deployment", "peft-serve"]["spec"]
    for name in ("replicas", "strategy"):
        assert theirs[name] == ours[name]
    (ours,), (theirs,) = (each["template"]["spec"]["containers"] for each in (ours, theirs))
    assert (theirs["env"], theirs["envFrom"]) == (ours["env"], ours["envFrom"])
    assert found["NetworkPolicy", "peft-serve"]["spec"]["egress"] == policy()["spec"]["egress"]
