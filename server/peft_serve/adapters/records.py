"""Facts about checkpoints that store, catalog, gate and HTTP exchange. No torch, no disk, no behaviour to speak of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft_serve.adapters.vocabulary import VOCABULARY_FILES, Vocabulary
from peft_serve.core import AdapterId

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROFILE_FILE = "peft_serve.json"
HUB_WEIGHTS_FILE = "adapter.safetensors"  # what AdapterHub calls the weights; kept as WEIGHTS_FILE
HEAD_CONFIG_FILE = "head_config.json"  # AdapterHub keeps a task head in files of its own
HEAD_WEIGHTS_FILE = "model_head.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """The files of a checkpoint, whole, in memory and untrusted."""

    config: bytes
    weights: bytes
    profile: bytes | None = None
    head_config: bytes | None = None
    head_weights: bytes | None = None
    vocabulary: Mapping[str, bytes] = field(default_factory=dict)  # of VOCABULARY_FILES those that are there
    ignored: tuple[str, ...] = ()  # names of other files that came along and are not read

    def contents(self) -> dict[str, bytes]:
        """Every file that is read, by the name it is kept under, in the order of the digest."""
        given = {
            CONFIG_FILE: self.config,
            WEIGHTS_FILE: self.weights,
            PROFILE_FILE: self.profile,
            HEAD_CONFIG_FILE: self.head_config,
            HEAD_WEIGHTS_FILE: self.head_weights,
            **{name: self.vocabulary.get(name) for name in VOCABULARY_FILES},
        }
        return {name: content for name, content in given.items() if content is not None}

    @property
    def num_bytes(self) -> int:
        return sum(len(content) for content in self.contents().values())

    def digest(self) -> AdapterId:
        """The adapter id: sha256 over every file that is read, each framed by its name and length."""
        h = hashlib.sha256()
        for name, content in self.contents().items():
            h.update(f"{name}:{len(content)}\n".encode())
            h.update(content)
        return AdapterId(f"sha256:{h.hexdigest()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """`peft_serve.json`: how an adapter wants to be asked."""

    template: str | None = None  # holds `{text}` exactly once
    choices: Mapping[str, str] | None = None  # label -> the words the model is asked by
    parameters: Mapping[str, Any] = field(default_factory=dict)  # default request parameters
    labels: tuple[str, ...] | None = None
    examples: tuple[str, ...] = ()  # inputs it can be tried with


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """A task head, of an adapter or of the base."""

    task: str  # SEQ_CLS, TOKEN_CLS or QUESTION_ANS
    num_labels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the gate found out about an accepted checkpoint."""

    peft_type: str
    task_type: str | None
    base: str | None  # base_model_name_or_path of the config, compared and never followed
    rank: int
    num_bytes: int
    num_tensors: int  # tensors in the file that are bound to a place in the base
    num_sites: int  # places in the base that are filled
    modules: tuple[str, ...]  # last path components of those places, sorted, distinct
    warnings: tuple[str, ...] = ()
    num_virtual_tokens: int = 0  # context positions it takes in front of the prompt (decoder-only bases)
    num_tasks: int = 1  # tasks that it holds; with several, a request says which it wants
    ignores_segments: bool = False  # trained without token types: peft's QUESTION_ANS model passes none on
    head: HeadFacts | None = None  # the task head it brings along


class VersionState(StrEnum):
    """Where a version stands in its life."""

    ACTIVE = "active"  # a name points to it, or it can be named by version
    DRAINING = "draining"  # deleted; requests in flight end on it
    QUARANTINED = "quarantined"  # its files no longer match its digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable version of a name."""

    name: str
    number: int  # 1, 2, 3 ...
    id: AdapterId
    created: str  # RFC 3339, UTC
    summary: Summary | None  # None until a checkpoint of a read-only folder is first used
    source: str = ""  # where the server fetched it; empty: it was uploaded, or lies in a read-only folder
    state: VersionState = VersionState.ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a name stood for when a request was admitted."""

    name: str
    number: int
    id: AdapterId
    peft_type: str
    num_virtual_tokens: int  # context positions it takes in front of the prompt (decoder-only bases)
    profile: Profile
    head: HeadFacts | None = None  # the task head it brings along
    num_tasks: int = 1  # tasks that it holds; with several, a request says which it wants
    ignores_segments: bool = False  # trained without token types: peft's QUESTION_ANS model passes none on
    vocabulary: Vocabulary = field(default_factory=Vocabulary)  # its own chat template and added tokens
