"""An upload to a shared folder that is cut off, by `kill -9` and by the power, at any of its acts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from peft_serve.adapters.shared.folder_bucket import FolderBucket
from tests.adapters.shared.shared_fakes import GRACE_S, Clock, Names, Replica
from tests.adapters.store.memory_disk import MemoryDisk
from tests.adapters.store.store_fakes import checkpoint

HERE = Path(__file__).parents[3]
ROOT = Path("/srv/store")
OLD, NEW = checkpoint(1), checkpoint(2)


def test_kill_9_at_every_act_of_an_upload() -> None:
    """`tests.adapters.shared.kills` says what is looked at after each."""
    command = [sys.executable, "-m", "tests.adapters.shared.kills"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE, check=False, timeout=280)
    assert (ended.returncode, ended.stderr) == (0, "")
    counted = re.fullmatch(r"(\d+) kills: 0 lost, 0 half seen, 0 left over \((\d+) took .*\)\n", ended.stdout)
    assert counted is not None, ended.stdout
    assert int(counted[1]) > 40
    assert int(counted[2]) > 3, "some were killed between the change and its acknowledgement"


def mounted(disk: MemoryDisk) -> Replica:
    clock, names = Clock(), Names()
    return Replica(FolderBucket(ROOT, disk, clock=clock, new_name=names, grace_s=GRACE_S), clock, names)


def test_a_power_cut_at_every_act_of_an_upload_leaves_the_old_or_the_new_version() -> None:
    disk = MemoryDisk()
    server = mounted(disk)
    server.catalog.changes.publish("a", OLD)
    begun = len(disk.log)
    server.catalog.changes.publish("a", NEW)
    told = len(disk.log)
    seen: set[int] = set()
    for num_lines in range(begun, told + 1):
        for left in disk.after_power_cut(num_lines):
            found = mounted(MemoryDisk(left)).catalog
            now = found.resolve("a")
            assert (now.number, now.id) in {(1, OLD.digest()), (2, NEW.digest())}
            assert found.files(now.id) == (OLD if now.number == 1 else NEW)
            assert num_lines < told or now.number == 2, "what was acknowledged is there"
            seen.add(now.number)
    assert seen == {1, 2}
