"""The gate: an upload is hostile until every byte of it is accounted for.

It reads the files of a checkpoint with our own parsers, ties every tensor to a place in the base and checks
every value. It runs no code, no regular expression and no path of the upload, and never imports peft. What it
lets through, `compiler.compile_adapter` turns into primitives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft_serve.adapters.adapterhub.checkpoint import read_checkpoint
from peft_serve.adapters.adapterhub.config import is_adapterhub
from peft_serve.adapters.agreement import Agreement
from peft_serve.adapters.base import Base
from peft_serve.adapters.binding import Binder
from peft_serve.adapters.bound import Binding
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.cues import cues_of
from peft_serve.adapters.header import GATHERED, StoredTensor, parse_tensors
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.methods.refused import REFUSED
from peft_serve.adapters.profile import parse_profile
from peft_serve.adapters.records import CONFIG_FILE, PROFILE_FILE, WEIGHTS_FILE, CheckpointFiles, Profile, Summary
from peft_serve.adapters.registry import Method, SiteMethod
from peft_serve.adapters.strict_json import parse_object
from peft_serve.adapters.verdict import Verdict, quoted
from peft_serve.adapters.vocabulary import Vocabulary, parse_vocabulary
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterInvalid

KNOWN_PEFT = (0, 21)
LENGTHS = ("num_virtual_tokens", "adapter_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """A checkpoint that passed the gate: the facts about it, and views on its bytes for the compiler."""

    id: AdapterId
    summary: Summary
    profile: Profile
    vocabulary: Vocabulary  # not compared with the base's tokenizer, which the gate does not know
    method: Method
    config: Config
    binding: Binding

    @property
    def cues(self) -> tuple[int, ...]:
        """Token ids without which a prompt shows nothing of it."""
        return cues_of(self.method, self.config)


def inspect(
    files: CheckpointFiles, base: Base, limits: GateLimits, *, methods: Mapping[str, Method] = METHODS
) -> Inspected:
    """Check a checkpoint against the base.

    Raises `MalformedUpload` when a file cannot be read at all and `AdapterInvalid` with every reason found
    (at most ten) when it can be read and is refused.
    """
    verdict = Verdict()
    if files.num_bytes > limits.max_adapter_bytes:
        reason = f"has {files.num_bytes} bytes; this server takes at most {limits.max_adapter_bytes}"
        verdict.refuse(WEIGHTS_FILE, f"{reason} (the smaller of --max-adapter-bytes and --device-adapter-bytes)")
        verdict.settle()
    if is_adapterhub(files.config, limits):
        return _inspect_hub(files, base, limits, verdict)
    method, config = _read_config(files.config, methods, limits, verdict)
    profile = _read_profile(files.profile, limits, verdict)
    vocabulary = parse_vocabulary(files.vocabulary, verdict)
    tensors = parse_tensors(files.weights, limits, verdict)
    _check_sides(tensors, method, verdict)
    verdict.settle()
    _check_length(method, config, limits, verdict)
    binding = Binder(method, config, base, limits, verdict).bind(tensors)
    Agreement(method, config, base, binding.sites, verdict).check()
    _check_labels(profile, binding, verdict)
    _check_values(tensors, limits, verdict)
    verdict.settle()
    _compare(config, base, files, verdict)
    return Inspected(
        id=files.digest(),
        summary=_summary(method, config, binding, files, verdict),
        profile=profile,
        vocabulary=vocabulary,
        method=method,
        config=config,
        binding=binding,
    )


def glance(
    files: CheckpointFiles, limits: GateLimits, *, methods: Mapping[str, Method] = METHODS
) -> tuple[str, str | None]:
    """As much of `inspect` as needs no base; gives the peft type and the base that the config names.

    Raises as `inspect` does. What passes may still not fit a base. The type of AdapterHub's own is "ADAPTERHUB".
    """
    verdict = Verdict()
    peft_type, trained_on = "ADAPTERHUB", None
    if not is_adapterhub(files.config, limits):
        method, config = _read_config(files.config, methods, limits, verdict)
        peft_type, trained_on = method.peft_type, config.text("base_model_name_or_path") or None
        rank = config.raw("r")
        if peft_type == "LORA" and isinstance(rank, int) and rank > limits.max_rank:
            verdict.refuse(f"{CONFIG_FILE}: r", f"is {rank}; a server takes at most --max-rank {limits.max_rank}")
    _read_profile(files.profile, limits, verdict)
    parse_vocabulary(files.vocabulary, verdict)
    _check_values(parse_tensors(files.weights, limits, verdict), limits, verdict)
    verdict.settle()
    return peft_type, trained_on


def _inspect_hub(files: CheckpointFiles, base: Base, limits: GateLimits, verdict: Verdict) -> Inspected:
    """The same for a checkpoint that AdapterHub's library saved."""
    hub = read_checkpoint(files, base, limits, verdict)
    profile = _read_profile(files.profile, limits, verdict)
    vocabulary = parse_vocabulary(files.vocabulary, verdict)
    if profile.labels is None and hub.labels:
        profile = replace(profile, labels=hub.labels)
    _check_sides(hub.tensors, hub.method, verdict)
    _check_labels(profile, hub.binding, verdict)
    _check_values(hub.tensors, limits, verdict)
    verdict.settle()
    _compare(hub.config, base, files, verdict)
    return Inspected(
        id=files.digest(),
        summary=_summary(hub.method, hub.config, hub.binding, files, verdict),
        profile=profile,
        vocabulary=vocabulary,
        method=hub.method,
        config=hub.config,
        binding=hub.binding,
    )


def _read_config(
    content: bytes, methods: Mapping[str, Method], limits: GateLimits, verdict: Verdict
) -> tuple[Method, Config]:
    fields: dict[str, Any] = parse_object(content, name=CONFIG_FILE, max_bytes=limits.max_config_bytes)
    peft_type = fields.get("peft_type")
    method = methods.get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        reason = REFUSED.get(peft_type) if isinstance(peft_type, str) else None
        served = f"served are {', '.join(sorted(methods))}"
        if reason is not None:
            served = f"{reason}; {served}"
        verdict.refuse(f"{CONFIG_FILE}: peft_type", f"is {quoted(peft_type)}; {served}")
        verdict.settle()
        raise AssertionError("settle raises when something was refused")
    return method, method.schema.check(fields, verdict)


def _read_profile(content: bytes | None, limits: GateLimits, verdict: Verdict) -> Profile:
    if content is None:
        return Profile()
    try:
        return parse_profile(content, max_new_tokens=limits.max_new_tokens)
    except AdapterInvalid as error:
        verdict.adopt(error)
        return Profile()


def _check_length(method: Method, config: Config, limits: GateLimits, verdict: Verdict) -> None:
    """Of what every token attends to beside the tokens: a soft prompt, a prefix, a gated prompt in some layers."""
    for name in [name for name in LENGTHS if name in method.schema.required]:
        length = config.integer(name)
        if length <= limits.max_virtual_tokens:
            continue
        verdict.refuse(
            f"{CONFIG_FILE}: {name}",
            f"is {length}; this server was started with --max-virtual-tokens {limits.max_virtual_tokens}; "
            "retrain with fewer or ask the operator",
        )


def _check_sides(tensors: tuple[StoredTensor, ...], method: Method, verdict: Verdict) -> None:
    """Refuse tensors without a value, but for a method whose training may leave some."""
    if isinstance(method, SiteMethod) and method.may_be_empty:
        return
    for tensor in tensors:
        if 0 in tensor.shape:
            verdict.refuse(tensor.name, f"is empty, of shape {list(tensor.shape)}; {GATHERED}")


def _check_labels(profile: Profile, binding: Binding, verdict: Verdict) -> None:
    facts = None if binding.head is None else binding.head.facts
    if profile.labels is not None and facts is not None and len(profile.labels) != facts.num_labels:
        verdict.refuse(
            f"{PROFILE_FILE}: labels",
            f"has {len(profile.labels)} names; the task head has {facts.num_labels} outputs; name each of them once",
        )


def _check_values(tensors: tuple[StoredTensor, ...], limits: GateLimits, verdict: Verdict) -> None:
    for tensor in tensors:
        if not tensor.is_within(limits.max_abs):
            verdict.refuse(
                tensor.name,
                f"holds NaN, Infinity or a value beyond {limits.max_abs:g}; upload a checkpoint from before that",
            )


def _compare(config: Config, base: Base, files: CheckpointFiles, verdict: Verdict) -> None:
    """What differs and may well be right: it is told and not refused."""
    trained_on = config.text("base_model_name_or_path")
    if trained_on and _last_part(trained_on) != _last_part(base.name):
        verdict.warn(f"was trained on {quoted(trained_on)} and is served on {quoted(base.name)}")
    version = config.text("peft_version")
    if _release(version) > KNOWN_PEFT:
        verdict.warn(f"was saved by peft {quoted(version)}, which is newer than this server knows")
    for name in files.ignored[:10]:
        verdict.warn(f"file {quoted(name)} is not read")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _release(version: str) -> tuple[int, ...]:
    numbers = version.split(".")[:2]
    return tuple(int(n) for n in numbers) if all(n.isdecimal() and len(n) < 6 for n in numbers) else ()


def _summary(method: Method, config: Config, binding: Binding, files: CheckpointFiles, verdict: Verdict) -> Summary:
    return Summary(
        peft_type=method.peft_type,
        task_type=config.text("task_type") or None,
        base=config.text("base_model_name_or_path") or None,
        rank=max((site.rank for site in binding.sites.values()), default=0),
        num_bytes=files.num_bytes,
        num_tensors=binding.num_tensors,
        num_sites=len(binding.sites),
        modules=tuple(sorted({path.rpartition(".")[2] for path in binding.sites})),
        warnings=verdict.warnings,
        num_virtual_tokens=config.integer("num_virtual_tokens", 0),
        head=None if binding.head is None else binding.head.facts,
        num_tasks=method.num_tasks(config),
        ignores_segments=bool(config.text("peft_type")) and config.text("task_type") == "QUESTION_ANS",
    )
