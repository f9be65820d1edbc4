"""One server of the demo base and one of a tiny encoder, for the tests of all clients."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.serving import server_bin, serving

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is looked up when litellm is imported


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the demo base with its adapters."""
    with serving("demo-llama", tmp_path_factory.mktemp("demo")) as address:
        yield address


@pytest.fixture(scope="session")
def encoder_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of a tiny BERT: `moods` labels texts, `names` labels words."""
    folder = tmp_path_factory.mktemp("encoder")
    if "SERVER_BIN" in os.environ:
        script = Path(__file__).with_name("tiny_encoder.py")
        subprocess.run([server_bin() / "python", "-W", "ignore", script, folder], check=True)
    else:  # this Python is the server's, and has imported most of what it takes
        from tests.clients.tiny_encoder import write

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(folder)
    with serving(str(folder / "tiny-bert"), folder, "--adapters", str(folder / "adapters")) as address:
        yield address


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client refuses every address in its offline mode, this machine's own too."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if int(importlib.metadata.version("huggingface_hub").split(".")[0]) < 1:
        from huggingface_hub.utils import reset_sessions

        reset_sessions()  # it keeps the offline mode of the moment it was made
