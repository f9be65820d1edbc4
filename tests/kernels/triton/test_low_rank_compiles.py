"""The kernels compile for the GPU they are written for, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

_MOST_SHARED = 227 * 1024  # bytes of a block on sm_90

_PROGRAM = """
import json
import triton.language as tl
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft_serve.kernels.triton import eight_bits_kernels, gated_kernels, low_rank_kernels, mixing_kernels

SIZES = ("num_in", "num_out", "num_features", "width", "head_dim")  # multiples of 16, as a rule


def compiled(kernel, types, **constants):
    signature, facts = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        signature[name] = kind
        if name in SIZES or kind.startswith("*"):
            facts[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=facts)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return {"shared": made.metadata.shared, "ptx": made.asm["ptx"], "cubin": len(made.asm["cubin"])}


tables = {"entries_ptr": "*i64", "tiles_ptr": "*i32", "members_ptr": "*i32", "low_ptr": "*fp32"}
each = {
    "shrink": compiled(
        low_rank_kernels.shrink, tables, HEIGHT=64, STEP=128, PART=512, IS_WHOLE=True, OPERAND=tl.bfloat16
    ),
    "expand": compiled(
        low_rank_kernels.expand, tables, HEIGHT=16, COLUMNS=128, HAS_SCALE=True, HAS_SHIFT=True, OPERAND=tl.bfloat16
    ),
    "look_up": compiled(
        low_rank_kernels.look_up, tables | {"ids_ptr": "*i64"}, HEIGHT=16, RANKS=16, ELEMENT=tl.bfloat16
    ),
    "add_gated": compiled(
        gated_kernels.add_gated, tables | {"scale": "fp32"}, HEIGHT=16, KEYS=16, SIZE=128, OPERAND=tl.bfloat16
    ),
    "mix": compiled(mixing_kernels.mix, tables, HEIGHT=16, OPERAND=tl.bfloat16),
    "multiply": compiled(
        eight_bits_kernels.multiply, {"values_ptr": "*i8", "steps_ptr": "*fp32"}, TOKENS=32, COLUMNS=64, STEP=128,
        IS_FLOAT=True, HAS_FLOAT=True, HAS_BIAS=True, OPERAND=tl.bfloat16
    ),
}
print(json.dumps(each))
"""


def test_for_hopper(tmp_path: Path) -> None:
    """Products go to tensor cores, and reads are as wide as they can be, through addresses that tables hold."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environ, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, made in json.loads(done.stdout).items():
        assert made["cubin"], name
        assert made["shared"] <= _MOST_SHARED, name
        assert "__local_depot" not in made["ptx"], f"{name} runs out of registers"
        if name == "look_up":
            continue  # it multiplies nothing, and reads a number here and there
        assert "wgmma" in made["ptx"] or "mma.sync" in made["ptx"], f"{name} multiplies without tensor cores"
        assert "cp.async.cg.shared.global" in made["ptx"] or "ld.global.v4" in made["ptx"], f"{name} reads in crumbs"
