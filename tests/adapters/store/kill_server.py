"""A whole server that is killed by `kill -9` while it takes uploads over HTTP, and what the next one says of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_S = 240.0
NAMES = ("a", "B", "c.d")
SAMPLE = Path(__file__).parents[3] / "adapters" / "demo-llama" / "sst2"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server over the store in `folder`; it is killed at the end."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "peft_serve", "serve", "demo-llama", "--port", "0", "--store", str(folder / "s")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PEFT_SERVE_NUM_THREADS": "1"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            with httpx.Client(base_url=_address(process, log), timeout=60.0, trust_env=False) as client:
                yield process, client
        finally:
            process.kill()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if ready := re.search(r"ready at (http://\S+:[1-9]\d*)", log.read_text()):
            return ready[1]
        time.sleep(0.05)
    raise RuntimeError(f"the server did not get ready:\n{log.read_text()}")


def archive(number: int) -> bytes:
    """A checkpoint of the demo base that differs from every other number's."""
    weights = (SAMPLE / "adapter_model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", weights[:8])[0]
    changed = struct.pack("<ee", number % 1000 / 1e3, number // 1000 / 1e3)  # its values are float16
    weights = weights[:start] + changed + weights[start + 4 :]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("adapter_config.json", (SAMPLE / "adapter_config.json").read_bytes())
        made.writestr("adapter_model.safetensors", weights)
    return buffer.getvalue()


def upload_until_killed(
    client: httpx.Client, rng: random.Random, told: list[tuple[str, str]], refused: list[str]
) -> None:
    """Upload on and on; what was acknowledged is told as (name, digest). Nothing should be refused."""
    while True:
        name, content = rng.choice(NAMES), archive(rng.randrange(1 << 20))
        try:
            answer = client.put(f"/adapters/{name}", content=content, headers={"content-type": "application/zip"})
        except httpx.HTTPError:
            return
        if answer.status_code not in (200, 201):
            refused.append(f"{answer.status_code} {answer.text}")
            return
        told.append((name, answer.json()["digest"]))


def check(client: httpx.Client, told: list[tuple[str, str]]) -> int:
    """Everything acknowledged is there by its digest, byte for byte, and answers; how many versions there are."""
    num_versions = 0
    for name in {name for name, _ in told}:
        versions = client.get(f"/adapters/{name}/versions").json()["versions"]
        listed = [version["digest"] for version in versions]
        acknowledged = [digest for each, digest in told if each == name]
        if not set(acknowledged) <= set(listed):
            raise RuntimeError(f"{name}: {set(acknowledged) - set(listed)} was acknowledged and is lost")
        for digest in listed:
            packed = client.get(f"/adapters/{name}@{digest}/archive")
            if packed.status_code != 200 or _digest(packed.content) != digest:
                raise RuntimeError(f"{name}@{digest}: what is there is not whole ({packed.status_code})")
        answer = client.post(
            f"/generate?adapter={name}", json={"inputs": "fine", "parameters": {"max_new_tokens": 2}}
        ).json()
        if answer["adapter"]["digest"] not in listed[listed.index(acknowledged[-1]) :]:
            raise RuntimeError(f"{name} answers with an older version than was acknowledged: {json.dumps(answer)}")
        num_versions += len(listed)
    return num_versions


def _digest(packed: bytes) -> str:
    digest = hashlib.sha256()
    with tarfile.open(fileobj=io.BytesIO(packed)) as read:
        for member in read.getmembers():
            content = read.extractfile(member)
            assert content is not None, "files alone"
            digest.update(f"{Path(member.name).name}:{member.size}\n".encode())
            digest.update(content.read())
    return f"sha256:{digest.hexdigest()}"


def kill_server(num_kills: int, seed: int) -> None:
    told: list[tuple[str, str]] = []
    refused: list[str] = []
    num_versions = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number in range(num_kills + 1):
            rng = random.Random(seed + number)
            with serving(folder) as (process, client):
                if told:
                    num_versions = check(client, told)
                if number == num_kills:
                    break
                before = len(told)
                uploads = threading.Thread(target=upload_until_killed, args=(client, rng, told, refused))
                uploads.start()
                while len(told) == before and uploads.is_alive():
                    time.sleep(0.01)
                time.sleep(2 * rng.random())
                os.kill(process.pid, signal.SIGKILL)
                uploads.join()
                if refused:
                    raise RuntimeError(f"an upload was refused: {refused}")
    print(
        f"{num_kills} kills of a server, {len(told)} acknowledged uploads: 0 lost, 0 partly visible "
        f"({num_versions} versions there at the end)"
    )
