"""The blocks of a page: what a reader would type, in the order of the page.

A fenced block of `bash` or `python` is run where it stands. One whose first line is a comment with a file's name
(`# publish.sh`) is that file, and only written. Of a workflow in YAML the `run` lines of its steps are run. Comments
of HTML in front of a block, which no reader sees, say what a test has to know:

    <!-- not run: why -->        nothing is done with the block
    <!-- fails: words -->        its last command fails, and the words are said

A line `# => words` in a block says what is printed; the test holds the page to that too.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LANGUAGES: Final = ("bash", "python", "yaml")
_BLOCK: Final = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>.+?) -->\n *)?```(?P<language>\w*)\n(?P<text>.*?)^ *```", re.M | re.S
)
_FILE: Final = re.compile(r"# (?P<name>[\w./-]+\.\w+)(?:\s.*)?$")
_PRINTED: Final = re.compile(r"^# => (.+)$", re.M)
_NOT_RUN: Final = "not run: "
_FAILS: Final = "fails: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of a page."""

    page: str
    line: int
    language: str  # as fenced; empty for a block that is only shown
    text: str
    mark: str  # the comment in front of it; empty without one

    @property
    def reason(self) -> str:
        """Why it is not run; empty for one that is."""
        return self.mark.removeprefix(_NOT_RUN) if self.mark.startswith(_NOT_RUN) else ""

    @property
    def refusal(self) -> str:
        """What its failing command says; empty for one that succeeds."""
        return self.mark.removeprefix(_FAILS) if self.mark.startswith(_FAILS) else ""

    @property
    def file(self) -> str:
        """The name of the file it is; empty for one that is run."""
        found = _FILE.match(self.text.partition("\n")[0])
        return found["name"] if found else ""

    @property
    def printed(self) -> list[str]:
        """What the page says is printed."""
        return _PRINTED.findall(self.text)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Every block of a page in its order."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        yield Block(
            page=page.name,
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            text=textwrap.dedent(found["text"]),
            mark=found["mark"] or "",
        )
