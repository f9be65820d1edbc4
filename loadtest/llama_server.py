"""llama.cpp's server as a process: its files made from the load test's base and adapters, its command, its adapters.

It takes adapters when it starts and at no other time, numbers them in the order of its command line, and batches only
requests that ask for the same ones. Every adapter is given but not applied (``--lora-init-without-apply``); requests
switch theirs on. Source: llama.cpp's ``tools/server/README.md``.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.gguf_models import adapter_to_gguf, base_to_gguf

CONTEXT_STEP = 256
CACHE_TYPES: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaFiles:
    """What llama.cpp is given: the base and its adapters, in one dtype."""

    base: Path
    adapters: tuple[Path, ...]
    dtype: str


def files_for(base: Path, adapters: list[Path], work: Path, *, dtype: str) -> Iterator[Path]:
    """Make the GGUF file of `base` and of each adapter under `work` where they are not there yet, and yield each."""
    folder = work / "gguf"
    whole = folder / f"{base.name}-{dtype}.gguf"
    yield whole if whole.exists() else base_to_gguf(base, whole, dtype=dtype)
    for adapter in adapters:
        path = folder / f"{adapter.parent.name}-{dtype}" / f"{adapter.name}.gguf"
        yield path if path.exists() else adapter_to_gguf(adapter, path, dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCommand:
    """How to start it: `slots` requests at once, each of at most `context` tokens; `arguments` come last and win."""

    program: Path
    files: LlamaFiles
    slots: int
    context: int
    num_threads: int
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 600.0
    ready_path: str = "/health"

    def line(self, port: int) -> list[str]:
        """The whole command. Its cache of prompts in RAM is off: no prompt comes twice, and it would only grow."""
        context = -(-self.context // CONTEXT_STEP) * CONTEXT_STEP * self.slots
        kind = CACHE_TYPES[self.files.dtype]
        command = [str(self.program), "--model", str(self.files.base), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--parallel", str(self.slots), "--ctx-size", str(context), "--cache-ram", "0"]
        command += ["--threads", str(self.num_threads), "--threads-batch", str(self.num_threads)]
        command += ["--cache-type-k", kind, "--cache-type-v", kind, "--metrics", "--no-webui"]
        if self.files.adapters:
            command += ["--lora", ",".join(map(str, self.files.adapters)), "--lora-init-without-apply"]
        return [*command, *self.arguments]


def adapter_ids(url: str, *, peer: str, api_key: str | None = None) -> dict[str, int]:
    """The numbers of the adapters that a server at `url` was started with, by the names of their files;
    RuntimeError, naming `peer`, if it is no server of llama.cpp's or is not there."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(f"{url}/lora-adapters", headers=headers), timeout=60.0) as answer:
            listed: list[dict[str, Any]] = json.load(answer)
        return {Path(one["path"]).stem: int(one["id"]) for one in listed}
    except urllib.error.HTTPError as refused:
        with refused:
            raise RuntimeError(f"peer {peer}: {url}/lora-adapters answers with status {refused.code}") from None
    except OSError as problem:
        raise RuntimeError(f"peer {peer}: nobody answers at {url} ({problem})") from None
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(f"peer {peer}: {url}/lora-adapters lists no adapters as llama.cpp's server does") from None
