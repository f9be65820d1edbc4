"""Reads one adapter of a shared store for a process that serves nothing: it leaves no mark and changes nothing."""

from __future__ import annotations

import time
import uuid

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.shared.blobs import Blobs
from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.documents import Documents
from peft_serve.adapters.shared.names import NameRecords


def read_current(bucket: Bucket, name: str) -> CheckpointFiles | None:
    """What `name` stands for now; None if that is nothing. Raises AdapterUnavailable, AdapterDamaged among them."""

    def new_name() -> str:
        return uuid.uuid4().hex

    documents = Documents(bucket, new_name)
    current = NameRecords(bucket, documents).read(name).current_version
    if current is None:
        return None
    return Blobs(bucket, documents, clock=time.monotonic, new_name=new_name, grace_s=0.0).read(current.id)
