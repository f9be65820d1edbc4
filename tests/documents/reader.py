"""Somebody who does what a page says, word for word, and looks whether it works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from tests.clients.serving import server_bin
from tests.documents.blocks import Block

WATCHED: Final = "/srv/incoming"  # on the pages; the server of the test watches a folder of its own
LIMIT_S: Final = 120.0
HEAD: Final = 'set -eo pipefail\ncurl() { command curl --fail-with-body -sS "$@"; }\n'
"""In front of every block: a refused request fails the block, which curl by itself does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A folder to work in, the address of a server, and the folder that this server watches."""

    folder: Path
    url: str
    watched: Path

    def told(self, text: str) -> str:
        """The page's words with the address and the folder of this server."""
        here = re.sub(r"(http://)?(localhost|127\.0\.0\.1):8000", self.url, text)
        return here.replace(WATCHED, str(self.watched))

    def does(self, block: Block) -> None:
        """What the block says; raises AssertionError where it does not go as the page has it."""
        text = self.told(block.text)
        if block.file:
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if block.language == "yaml":
            for line in _steps_of(text):
                self._run(block, ["bash", "-c", HEAD + line])
        elif block.language == "python" and not block.file:
            self._run(block, [sys.executable, "-W", "ignore", "-c", text])
        elif not block.file:
            self._run(block, ["bash", "-c", HEAD + text])

    def _run(self, block: Block, words: Sequence[str]) -> None:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self._environment(block),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == bool(block.refusal), f"{block} ended with {done.returncode}:\n{said}"
        for expected in [*block.printed, *([block.refusal] if block.refusal else [])]:
            assert expected in said, f"{block}: {expected!r} is not in:\n{said}"

    def _environment(self, block: Block) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{server_bin()}{os.pathsep}{os.environ['PATH']}",
            "PEFT_SERVE_URL": self.url,
            "OMP_NUM_THREADS": "1",
            # The hub's client refuses every address in its offline mode, and no snippet of Python asks the hub.
            "HF_HUB_OFFLINE": "0" if block.language == "python" else "1",
            "COLUMNS": "200",
        }


def _steps_of(workflow: str) -> Iterator[str]:
    """The commands in a workflow's steps; none of any other YAML."""
    for job in (yaml.safe_load(workflow).get("jobs") or {}).values():
        yield from (step["run"] for step in job["steps"] if "run" in step)
