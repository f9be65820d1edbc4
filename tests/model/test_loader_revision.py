"""A base from the hub's cache, without a network: a revision is what it says, and what is missing is said in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_serve.model.loader import NotServable, load_base
from tests.model.tiny_models import tiny

_SCRIPT = """
import json, sys
from peft_serve.model.loader import NotServable, load_base
def told(revision, name="org/tiny"):
    try:
        base = load_base(name, dtype="float32", device="cpu", revision=revision)
    except NotServable as error:
        return str(error)
    return [base.name, base.model.lm_head.weight.sum().item()]
print(json.dumps([told("v1"), told("v2"), told(None), told("v3"), told(None, "org/other"), told(None, "demo_lama")]))
"""


def test_revisions_of_a_hub_id(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    sums = {}
    for seed, (revision, commit) in enumerate({"v1": "a" * 40, "v2": "b" * 40}.items()):
        model = tiny("llama", seed=seed)
        model.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
        sums[revision] = model.get_output_embeddings().weight.sum().item()
    (repository / "refs" / "main").write_text("b" * 40)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, main, missing, other, misspelt = json.loads(done.stdout.splitlines()[-1])
    assert [first, second, main] == [["org/tiny", pytest.approx(sums[each])] for each in ("v1", "v2", "v2")]
    assert sums["v1"] != pytest.approx(sums["v2"])
    for name, refusal in (("org/tiny at v3", missing), ("org/other", other)):
        assert refusal.startswith(f"{name}: no configuration can be read: ")
        assert "HF_HUB_OFFLINE" in refusal
        assert "no folder here has this name; asked for on the hub: " in refusal
    assert "no folder here has this name (did you mean demo-llama?); asked" in misspelt


def test_a_folder_has_no_revisions() -> None:
    with pytest.raises(NotServable, match=r"--revision v1: demo-llama is a folder"):
        load_base("demo-llama", revision="v1")
