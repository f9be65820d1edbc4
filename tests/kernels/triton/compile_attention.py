"""Compiles the attention kernels for an H200 (sm_90), which needs no GPU, and prints what became of each.

Run by itself: where Triton's interpreter is on, there is nothing to compile.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_serve.kernels.triton.attention_program import attend_tiles, merge_parts

TILES: dict[str, Any] = (
    dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    | dict.fromkeys(("tiles_ptr", "blocks_ptr"), "*i32")
    | dict.fromkeys(("here_ptr", "bias_ptr", "sinks_ptr"))
    | dict.fromkeys(("q_t", "q_h", "k_p", "k_h"), "i32")
    | {"parts_ptr": "*fp32", "K": 8, "G": 4, "D": 128, "D_PAD": 128, "BLOCK": 16, "M": 16, "N": 64, "SCALING": 0.1}
    | {"SOFTCAP": 0.0, "WINDOW": 0, "FAR": 0, "DIVISOR": 1.0, "IS_CAUSAL": True, "WIDEN": False}
)
EVERYTHING = {"here_ptr": "*i32", "bias_ptr": "*bf16", "sinks_ptr": "*bf16", "SOFTCAP": 50.0, "WINDOW": 4096}
PARTS = {"out_ptr": "*bf16", "parts_ptr": "*fp32", "merges_ptr": "*i32", "sinks_ptr": "*bf16", "H": 32, "D": 80}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "decode": (attend_tiles, TILES),
    "prefill with everything": (attend_tiles, {**TILES, **EVERYTHING, "M": 64, "D": 80}),
    "merge": (merge_parts, {**PARTS, "D_PAD": 128, "S": 32}),
}


def compiled(kernel: Any, given: dict[str, Any]) -> Any:
    """By a parameter's name either its type, or the number (or None) that it is compiled for."""
    types = {name: given[name] if isinstance(given[name], str) else "constexpr" for name in kernel.arg_names}
    numbers = {(i,): given[n] for i, n in enumerate(kernel.arg_names) if types[n] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n] != "constexpr"}
    options = {"num_warps": 4, "num_stages": 3}
    return triton.compile(ASTSource(kernel, types, numbers, aligned), target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(kernel: Any, folder: Path) -> int:
    """What a thread keeps outside its registers."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"STACK:(\d+)", usage))


if __name__ == "__main__":
    made = {name: compiled(*case) for name, case in CASES.items()}
    with TemporaryDirectory() as folder:
        facts = {
            name: {
                "shared": kernel.metadata.shared,
                "stack": stack_bytes(kernel, Path(folder)),
                "has_tensor_cores": "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"],
                "copies_ahead": "cp.async" in kernel.asm["ptx"],
            }
            for name, kernel in made.items()
        }
    print(json.dumps(facts))
