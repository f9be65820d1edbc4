"""A checkpoint's files, and a folder that is only in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from peft_serve.adapters.sources.folder import Mark

FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": b"\x10" + b"weights",
    "README.md": b"words",
}


def put(folder: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """A folder with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class MemoryFolder:
    """A `SourceFolder` over a dictionary; `on_read` may change it in between."""

    def __init__(self, files: dict[str, bytes], on_read: Callable[[str], None] = lambda _name: None) -> None:
        self.files = files
        self.reads: list[str] = []
        self._on_read = on_read

    @property
    def provenance(self) -> str:
        return "memory:one"

    def listing(self) -> Mapping[str, Mark]:
        return {name: Mark(len(content), str(hash(content))) for name, content in self.files.items()}

    def read(self, name: str, max_bytes: int, on_bytes: Callable[[int], None]) -> bytes:
        self.reads.append(name)
        content = self.files[name]
        for start in range(0, len(content), 4):
            on_bytes(len(content[start : start + 4]))
        self._on_read(name)
        return content
