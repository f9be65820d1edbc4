"""The attention kernels compile for an H200, use its tensor cores and fit its registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SHARED_BYTES = 227 << 10  # that a program may have on sm_90 (CUDA C++ programming guide, table of compute capabilities)


def test_the_kernels_compile_without_a_gpu(repository: Path, tmp_path: Path) -> None:
    from triton import knobs

    if not Path(knobs.nvidia.ptxas.path).exists():
        pytest.skip("Triton came without ptxas")
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.triton.compile_attention"]
    done = subprocess.run(command, cwd=repository, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    assert set(facts) == {"decode", "prefill with everything", "merge"}
    for name, fact in facts.items():
        assert fact["shared"] <= SHARED_BYTES, name
        assert fact["has_tensor_cores"] == fact["copies_ahead"] == (name != "merge"), name
        assert fact["stack"] == 0 or name == "merge", f"{name} runs out of registers"
