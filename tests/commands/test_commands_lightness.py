"""A command that only asks a server starts without the libraries that take seconds."""

from __future__ import annotations

import subprocess
import sys


def test_the_command_line_knows_no_torch_until_it_is_needed() -> None:
    program = "import sys, peft_serve.cli; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.strip() == "[]", said.stdout
