"""The gate under a coverage-guided fuzzer, for nights: `python -m tests.attacks.fuzz_gate CORPUS -max_total_time=3600`.

Needs atheris (`pip install atheris`), which is no dependency of ours, and takes libFuzzer's options. An input's first
byte says what the rest is: a config, a tensor file, a header, an archive, a profile, an expression of names. What the
gate refuses is fine, and what it lets in must compile or be refused; any other exception is a finding, and libFuzzer
keeps the input. `--seeds FOLDER` writes honest inputs to begin with, and needs no atheris.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from peft_serve.adapters.archive import read_upload
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.names import parse_expression, parse_ref
from peft_serve.adapters.profile import parse_profile
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.errors import ServeError
from tests.attacks.archives import HARMLESS, tarred, zipped
from tests.attacks.hostile import base_of, honest, join, split
from tests.attacks.subjects import METHOD_OF

LIMITS: Final = GateLimits(max_adapter_bytes=1 << 24)
UPLOADS: Final = UploadLimits(max_bytes=1 << 20)
PEFT_TYPES: Final = tuple(sorted(METHOD_OF))


def _config(peft_type: str, content: bytes) -> None:
    _through(CheckpointFiles(config=content, weights=honest(METHOD_OF[peft_type]).weights))


def _weights(peft_type: str, content: bytes) -> None:
    _through(CheckpointFiles(config=honest(METHOD_OF[peft_type]).config, weights=content))


def _header(peft_type: str, content: bytes) -> None:
    """The header alone, in front of the honest values."""
    files = honest(METHOD_OF[peft_type])
    _through(CheckpointFiles(config=files.config, weights=join(content, split(files.weights)[1])))


def _through(files: CheckpointFiles) -> None:
    base = base_of("llama")
    compile_adapter(inspect(files, base, LIMITS), base, LIMITS)


def _archive(_: str, content: bytes) -> None:
    read_upload(content, None, limits=UPLOADS)


def _profile(_: str, content: bytes) -> None:
    parse_profile(content)


def _names(_: str, content: bytes) -> None:
    for term in parse_expression(content.decode("utf-8", "replace")):
        parse_ref(term.ref)


TARGETS: Final[tuple[Callable[[str, bytes], None], ...]] = (_config, _weights, _header, _archive, _profile, _names)


def one_input(data: bytes) -> None:
    """What the fuzzer calls. The second byte chooses the served type, where one is meant."""
    if len(data) < 2:
        return
    with suppress(ServeError):
        TARGETS[data[0] % len(TARGETS)](PEFT_TYPES[data[1] % len(PEFT_TYPES)], data[2:])


def seeds() -> Mapping[str, bytes]:
    """Honest inputs by name: what the fuzzer begins with."""
    found = {"archive-zip": b"\x03\0" + zipped(), "archive-tar": b"\x03\0" + tarred(), "names": b"\x05\0a:0.7+b@2:0.3"}
    found |= {f"archive-{number}": b"\x03\0" + build() for number, build in enumerate(HARMLESS.values())}
    found["profile"] = b'\x04\0{"template": "Q: {text}", "choices": {"a": "b", "c": "d"}, "parameters": {"top_k": 3}}'
    for number, peft_type in enumerate(PEFT_TYPES):
        files = honest(METHOD_OF[peft_type])
        header_bytes = files.weights[8 : 8 + int.from_bytes(files.weights[:8], "little")]
        contents = (files.config, files.weights, header_bytes)
        for kind, content in enumerate(contents):
            found[f"{peft_type.lower()}-{kind}"] = bytes((kind, number)) + content
    return MappingProxyType(found)


def _write_seeds(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds().items():
        (folder / name).write_bytes(content)


def main() -> None:
    if sys.argv[1:2] == ["--seeds"]:
        _write_seeds(Path(sys.argv[2]))
        return
    import atheris

    base_of("llama")
    for peft_type in PEFT_TYPES:  # made by peft itself, before anything is counted
        honest(METHOD_OF[peft_type])
    for module in [module for name, module in sys.modules.items() if name.startswith("peft_serve.adapters")]:
        for function in [value for value in vars(module).values() if callable(value) and hasattr(value, "__code__")]:
            atheris.instrument_func(function)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
