"""Faults to plant: each a small change of the server that breaks one promise, and the tests that have to notice.

A change is an exact piece of text and what stands in its place. The text has to occur once in its file: when the code
has moved on, the fault has to be written anew (`test_faults_apply.py` says so at once).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`tests` are arguments of pytest. `file` is below server/peft_serve."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_STORE = ("tests/adapters/store/test_store_power.py",)
_SLOTS = ("tests/scheduling/test_slots.py",)
_ENGINE = ("tests/engine/test_engine.py",)
_APART = ("tests/model/test_apart.py",)
_DAYS = ("tests/scheduling/test_simulated.py",)

FAULTS = (
    Fault(
        name="a checkpoint's files are not synced",
        file="adapters/store.py",
        old="                self._fs.sync_file(folder / name)\n",
        new="",
        tests=_STORE,
    ),
    Fault(
        name="a checkpoint's folder is not synced",
        file="adapters/store.py",
        old="            self._fs.sync_dir(folder)\n            try:\n",
        new="            try:\n",
        tests=_STORE,
    ),
    Fault(
        name="the folder of names is not synced",
        file="adapters/store_folder.py",
        old="            self._fs.sync_dir(path.parent)\n",
        new="",
        tests=_STORE,
    ),
    Fault(
        name="a record is moved into place before it is synced",
        file="adapters/store_folder.py",
        old="            self._fs.sync_file(file)\n            self._fs.rename(file, path)\n",
        new="            self._fs.rename(file, path)\n            self._fs.sync_file(path)\n",
        tests=_STORE,
    ),
    Fault(
        name="files are not compared with their digest when they are read",
        file="adapters/store.py",
        old="            if files is not None and files.digest() == adapter:\n",
        new="            if files is not None:\n",
        tests=("tests/adapters/store/test_store_disk.py",),
    ),
    Fault(
        name="the gate takes a tensor that no config announces",
        file="adapters/completeness.py",
        old="            extra = list(site.saved)\n",
        new="            extra = []\n",
        tests=("tests/attacks/test_hostile_weights.py", "tests/attacks/test_hostile_configs.py"),
    ),
    Fault(
        name="a host copy is not given back",
        file="engine/host_copies.py",
        old="            del self._ready[adapter]\n            self._host_cache.release(adapter)\n",
        new="            del self._ready[adapter]\n",
        tests=_ENGINE,
    ),
    Fault(
        name="a request's lease on its slot is not given back",
        file="scheduling/memory.py",
        old="        tracked.lease.release()\n        tracked.lease = None\n",
        new="        tracked.lease = None\n",
        tests=("tests/scheduling/test_isolation.py",),
    ),
    Fault(
        name="a slot is given away while it is leased",
        file="scheduling/slots.py",
        old="        return seat.leases == 0 and seat.adapter not in self._pinned\n",
        new="        return seat.adapter not in self._pinned\n",
        tests=_SLOTS,
    ),
    Fault(
        name="the blocks of a request that ends are not freed",
        file="scheduling/memory.py",
        old="        self._blocks.release(tracked.table)\n        if self._cross_blocks is not None:\n",
        new="        if self._cross_blocks is not None:\n",
        tests=(*_ENGINE, "-k", "closed_stream"),
    ),
    Fault(
        name="keys and values are found without asking whose adapter made them",
        file="scheduling/prefix_cache.py",
        old="            digest.update(_actor(tracked, footprint, start, start + size))\n",
        new="",
        tests=("tests/scheduling/test_prefix_cache.py",),
    ),
    Fault(
        name="tenants share keys and values",
        file="scheduling/prefix_cache.py",
        old="labels[-1] if labels else _whose(tracked)",
        new='labels[-1] if labels else b""',
        tests=("tests/scheduling/test_tenants.py",),
    ),
    Fault(
        name="what a failed request computed can still be found",
        file="scheduling/outcome.py",
        old="                self._memory.distrust(tracked)\n",
        new="",
        tests=("tests/engine/test_engine_faults.py",),
    ),
    Fault(
        name="the queue takes one more than it may",
        file="engine/loop.py",
        old="            if (num_waiting := self._num_arriving + self._books.num_waiting) >= self._max_queue:\n",
        new="            if (num_waiting := self._num_arriving + self._books.num_waiting) > self._max_queue:\n",
        tests=(*_ENGINE, "-k", "full_queue"),
    ),
    Fault(
        name="a deadline is not kept",
        file="scheduling/roster.py",
        old="        for tracked in self._forecast.expired(now_s):\n",
        new="        for tracked in ():\n",
        tests=("tests/scheduling/test_step_time.py",),
    ),
    Fault(
        name="an adapter's rows stay where the next one's should be",
        file="model/sites.py",
        old="        self._layout.forget(slot)\n",
        new="",
        tests=("tests/model/test_sites_stacks.py", "tests/model/test_sites.py"),
    ),
    Fault(
        name="the tokens of a mixed batch are handed out in the wrong order",
        file="model/runner.py",
        old="for (k, _), one in zip(drawing, chosen, strict=True)}\n",
        new="for (k, _), one in zip(drawing, reversed(chosen), strict=True)}\n",
        tests=("tests/model/test_runner.py",),
    ),
    Fault(
        name="rows share a random seed",
        file="scheduling/draft.py",
        old="        seed=params.seed or 0,\n",
        new="        seed=0,\n",
        tests=("tests/scheduling/test_isolation.py",),
    ),
    Fault(
        name="a value that is no number is taken for a token",
        file="model/runner.py",
        old="(i not in chosen or chosen[i].is_number)",
        new="True",
        tests=_APART,
    ),
    Fault(
        name="stacks that were not written are taken for written",
        file="model/sites.py",
        old="            self._layout.forget_all()\n",
        new="",
        tests=_APART,
    ),
    Fault(
        name="a step that fails is nobody's fault but everybody's",
        file="model/apart.py",
        old="        return self._apart(rows, error)\n",
        new="        raise error\n",
        tests=_APART,
    ),
    Fault(
        name="what a tenant is given does not count",
        file="scheduling/order.py",
        old="        self._tenants.give(tracked.request.tenant, cost / tracked.request.tenant_weight)\n",
        new="",
        tests=_DAYS,
    ),
    Fault(
        name="a tenant that comes waits behind all the others",
        file="scheduling/order.py",
        old="        least = min(map(self.given, waiting), default=self._floor)\n",
        new="        least = max(map(self.given, waiting), default=self._floor)\n",
        tests=_DAYS,
    ),
    Fault(
        name="a tenant that comes when nobody waits has saved up what the others were given",
        file="scheduling/order.py",
        old="default=self._floor)\n",
        new="default=0.0)\n",
        tests=("tests/scheduling/test_tenants.py",),
    ),
    Fault(
        name="giants take every thread for texts",
        file="api/text_threads.py",
        old="        self._max_giants = max(1, num_threads - 1)\n",
        new="        self._max_giants = num_threads\n",
        tests=("tests/api/test_text_threads.py", "-k", "giants_leave"),
    ),
    Fault(
        name="what is made of an upload takes its place before the upload took place",
        file="adapters/compiled_store.py",
        old="is_draft = bool(self._uploads) and any(part.id in self._uploads for part in parts_of(adapter.id))\n",
        new="is_draft = False\n",
        tests=("tests/engine/test_loading.py", "-k", "refused"),
    ),
    Fault(
        name="a disk that turned read-only is found out behind the reasons of others",
        file="adapters/store_folder.py",
        old="                self._try()\n",
        new="                self.require_writable()\n",
        tests=("tests/api/test_api_store_trouble.py", "-k", "told_first"),
    ),
    Fault(
        name="a request with two hosts is answered",
        file="commands/request_line.py",
        old="    if len(hosts) > 1:\n",
        new="    if len(hosts) > 2:\n",
        tests=("tests/api/test_api_hosts.py",),
    ),
    Fault(
        name="what a zip holds beside the checkpoint is not counted",
        file="adapters/zip_reader.py",
        old="    if sum(entry.unpacked_bytes for entry in entries) >",
        new="    if sum(entry.unpacked_bytes for entry in entries if is_wanted(entry.path)) >",
        tests=("tests/adapters/store/test_store_archive.py",),
    ),
    Fault(
        name="a body may take as long as it likes",
        file="api/middleware.py",
        old="            async with asyncio.timeout_at(self._until_s):\n",
        new="            async with asyncio.timeout_at(None):\n",
        tests=("tests/api/test_api_connections.py", "-k", "body_that_trickles"),
    ),
    Fault(
        name="a full queue is said when everything has been read and planned",
        file="api/admission.py",
        old="        if snapshot.num_waiting >= limit:\n",
        new="        if False:\n",
        tests=("tests/api/test_api_leaving.py", "-k", "full_queue_is_said"),
    ),
    Fault(
        name="a change of a read-only store is refused for the wrong reason",
        file="adapters/changes.py",
        old="            self._store.require_writable()\n            self._check(",
        new="            self._check(",
        tests=("tests/api/test_api_store_trouble.py",),
    ),
    Fault(
        name="a record of a shared store is replaced whatever it says by now",
        file="adapters/shared/names.py",
        old="        if replaces is not None and seen[1] != replaces:\n            raise RecordMoved(name)\n",
        new="",
        tests=("tests/adapters/shared/test_shared_store.py", "tests/adapters/shared/test_shared_catalogs.py"),
    ),
    Fault(
        name="what an upload has just renewed is collected",
        file="adapters/shared/collector.py",
        old="if there is None or there.tag != what.tag:",
        new="if there is None:",
        tests=("tests/adapters/shared/test_shared_store.py", "-k", "collect"),
    ),
    Fault(
        name="what is deleted on another server stays in the engine's memory",
        file="engine/following.py",
        old="                let_go(self._engine, followed.gone)\n",
        new="                pass\n",
        tests=("tests/engine/test_following.py",),
    ),
    Fault(
        name="calls that wait for the disk use up everybody's threads",
        file="api/store_threads.py",
        old="        future = self.submit(work, *args, **kwargs)\n",
        new="        return await asyncio.to_thread(work, *args, **kwargs)\n",
        tests=("tests/api/test_api_store_trouble.py",),
    ),
    Fault(
        name="any key may delete an adapter",
        file="api/route_needs.py",
        old="upload   DELETE    /adapters/{name} /aliases/{name}\n",
        new="infer    DELETE    /adapters/{name} /aliases/{name}\n",
        tests=("tests/api/test_api_access.py",),
    ),
)
