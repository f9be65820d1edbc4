"""A blob's manifest: what the gate found out about the checkpoint, so that nobody reads the weights to list it.

It is derived from the files beside it and from the base they were checked against (`checked_for`); one that is
missing, damaged or made for another base is worked out again, never trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from peft_serve.adapters.records import HeadFacts, Profile, Resolved, Summary
from peft_serve.adapters.sealed import SealError, seal, unseal
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.core import AdapterId

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The gate's findings, and the key of the base and rules they hold for."""

    checked_for: str
    summary: Summary
    profile: Profile
    vocabulary: Vocabulary = field(default_factory=Vocabulary)


def resolved_as(name: str, number: int, adapter: AdapterId, found: Manifest) -> Resolved:
    """What a request is told of a version that this is the manifest of."""
    return Resolved(
        name=name,
        number=number,
        id=adapter,
        peft_type=found.summary.peft_type,
        num_virtual_tokens=found.summary.num_virtual_tokens,
        num_tasks=found.summary.num_tasks,
        ignores_segments=found.summary.ignores_segments,
        profile=found.profile,
        head=found.summary.head,
        vocabulary=found.vocabulary,
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as a sealed document."""
    profile, vocabulary = manifest.profile, manifest.vocabulary
    body = {
        "format": _FORMAT,
        "checked_for": manifest.checked_for,
        "summary": asdict(manifest.summary),
        "profile": {
            "template": profile.template,
            "choices": None if profile.choices is None else dict(profile.choices),
            "parameters": dict(profile.parameters),
            "labels": None if profile.labels is None else list(profile.labels),
            "examples": list(profile.examples),
        },
        "vocabulary": {
            "chat_template": vocabulary.chat_template,
            "added": dict(vocabulary.added),
            "special": sorted(vocabulary.special),
            "traits": {text: list(traits) for text, traits in vocabulary.traits.items()},
            "names": dict(vocabulary.names),
        },
    }
    return seal(body)


def decode_manifest(document: bytes) -> Manifest:
    """The manifest that `encode_manifest` wrote; raises SealError, for another format's too."""
    body = unseal(document)
    try:
        if body["format"] != _FORMAT:
            raise SealError("a manifest of another format")
        return Manifest(
            checked_for=body["checked_for"],
            summary=_summary(body["summary"]),
            profile=_profile(body["profile"]),
            vocabulary=_vocabulary(body.get("vocabulary", {})),  # a manifest from before there was any
        )
    except (KeyError, TypeError) as error:
        raise SealError("not a manifest") from error


def _summary(body: Mapping[str, Any]) -> Summary:
    fields = {**body, "modules": tuple(body["modules"]), "warnings": tuple(body["warnings"])}
    if fields.get("head") is not None:
        fields["head"] = HeadFacts(**fields["head"])
    return Summary(**fields)


def _profile(body: Mapping[str, Any]) -> Profile:
    labels = body["labels"]
    examples = tuple(body.get("examples", ()))  # a manifest from before there were any
    return Profile(**{**body, "labels": None if labels is None else tuple(labels), "examples": examples})


def _vocabulary(body: Mapping[str, Any]) -> Vocabulary:
    traits = {text: tuple(traits) for text, traits in body.get("traits", {}).items()}
    return Vocabulary(**{**body, "special": frozenset(body.get("special", ())), "traits": traits})
