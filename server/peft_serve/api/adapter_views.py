"""Adapters as they are told to callers. Pure functions over the catalog's and the engine's facts."""

from __future__ import annotations

from typing import Any

from peft_serve.adapters.changes import Published
from peft_serve.adapters.listing import Entry
from peft_serve.adapters.records import HeadFacts, Summary, Version
from peft_serve.core import AdapterId
from peft_serve.engine.snapshot import EngineSnapshot


def version_view(version: Version) -> dict[str, Any]:
    """One version of a name."""
    return {
        "name": version.name,
        "version": version.number,
        "digest": version.id,
        "state": version.state.value,
        "created": version.created,
        "source": version.source or None,
        **summary_view(version.summary),
    }


def head_view(head: HeadFacts | None) -> dict[str, Any] | None:
    """A task head: what it computes, and how many labels it has."""
    return None if head is None else {"task": head.task, "num_labels": head.num_labels}


def summary_view(summary: Summary | None) -> dict[str, Any]:
    """What the gate found; nulls for a checkpoint that nobody has used yet."""
    if summary is None:
        names = ("peft_type", "task_type", "base", "rank", "bytes", "num_tensors", "num_sites", "num_virtual_tokens")
        return dict.fromkeys(names) | {"head": None, "num_tasks": None, "modules": [], "warnings": []}
    return {
        "peft_type": summary.peft_type,
        "task_type": summary.task_type,
        "base": summary.base,
        "rank": summary.rank,
        "bytes": summary.num_bytes,
        "num_tensors": summary.num_tensors,
        "num_sites": summary.num_sites,
        "num_virtual_tokens": summary.num_virtual_tokens,
        "head": head_view(summary.head),
        "num_tasks": summary.num_tasks,
        "modules": list(summary.modules),
        "warnings": list(summary.warnings),
    }


def entry_view(entry: Entry, snapshot: EngineSnapshot) -> dict[str, Any]:
    """A name as it is listed: its current version, where that is now, and who uses it."""
    version = entry.version
    if version is None:
        content = {"name": entry.name, "version": None, "digest": None, "state": "active", "created": None}
        content |= {"source": None}
        content |= summary_view(None)
    else:
        content = version_view(version)
    if entry.problem:
        content["state"] = "quarantined" if content["state"] == "quarantined" else "refused"
    return content | {
        "problem": entry.problem or None,
        "read_only": entry.is_folder,
        "num_versions": entry.num_versions,
        "in_flight": entry.in_flight,
        **residency_view(None if version is None else version.id, snapshot),
    }


def residency_view(adapter: AdapterId | None, snapshot: EngineSnapshot) -> dict[str, Any]:
    """The fastest place the adapter is in."""
    resident = next((r for r in snapshot.resident if r.adapter == adapter), None)
    is_pinned = adapter in snapshot.pinned
    if resident is not None:
        return {"residency": "device", "pinned": is_pinned}
    return {"residency": "host" if adapter in snapshot.host_adapters else "disk", "pinned": is_pinned}


def published_view(published: Published) -> dict[str, Any]:
    """The answer to an upload."""
    before = published.previous
    previous = None if before is None else {"version": before.number, "digest": before.id}
    content = version_view(published.version) | {"previous": previous, "tried": published.proof.is_tried}
    content["warnings"] += published.proof.warnings
    return content
