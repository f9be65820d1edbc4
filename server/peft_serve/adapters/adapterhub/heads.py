"""AdapterHub's task heads, which it keeps in two files of their own.

Its flexible heads are stacks of linear layers with an activation between them; their layers are called
`heads.<activation>.<number>` here. What it calls a head of a language model is the model's own, and is only compared
with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from peft_serve.adapters.adapterhub.binding import REMEDY
from peft_serve.adapters.adapterhub.config import HubConfig
from peft_serve.adapters.adapterhub.schemas import ACTIVATIONS as HUB_ACTIVATIONS
from peft_serve.adapters.base import HAS_WEIGHT, Base
from peft_serve.adapters.bound import same_as_base
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.header import NOT_SERVED, StoredTensor
from peft_serve.adapters.heads import POOLER, BoundHead, HeadBinder, HeadForm, Reads, forms_of, task_of_class
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.paths import site_path
from peft_serve.adapters.primitives import HeadTask
from peft_serve.adapters.records import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE
from peft_serve.adapters.strict_json import parse_object
from peft_serve.adapters.verdict import Verdict, quoted

TASKS: Final[Mapping[str, HeadTask]] = {
    "classification": HeadTask.SEQUENCE,
    "tagging": HeadTask.TOKENS,
    "question_answering": HeadTask.SPANS,
}
LANGUAGE: Final = frozenset({"causal_lm", "seq2seq_lm", "masked_lm"})
INERT: Final = frozenset({"dropout_prob"})
READ: Final = frozenset({"head_type", "layers", "activation_function", "num_labels", "label2id", "use_pooler", "bias"})
ABOUT_LANGUAGE: Final = READ | {"vocab_size", "embedding_size", "layer_norm", "shift_labels"}
FLEXIBLE: Final = "heads"
MAX_LAYERS: Final = 9
WITHOUT: Final = "save the adapter with with_head=False to serve it without its head"
ACTIVATIONS: Final = frozenset(HUB_ACTIVATIONS) - {"leakyrelu"}  # keys of transformers' ACT2FN


@dataclass(frozen=True, slots=True)
class HubHead:
    """A head that was bound, and what its outputs are called; empty if it does not say."""

    bound: BoundHead | None
    labels: tuple[str, ...] = ()


class HubHeads:
    """Binds the head files of one checkpoint; refusals go to `verdict`."""

    def __init__(self, hub: HubConfig, base: Base, limits: GateLimits, verdict: Verdict) -> None:
        self._hub = hub
        self._base = base
        self._limits = limits
        self._verdict = verdict

    def bind(self, content: bytes, tensors: tuple[StoredTensor, ...]) -> HubHead:
        """The task head, or none when the files hold a language model's; raises `MalformedUpload`."""
        fields = parse_object(content, name=HEAD_CONFIG_FILE, max_bytes=self._limits.max_config_bytes)
        config = fields.get("config")
        if config is None:
            return self._of_class(str(fields.get("model_class")), tensors)
        if not isinstance(config, dict):
            self._refuse("config", "must be an object or null; upload the file as adapters wrote it")
            return HubHead(None)
        kind = config.get("head_type") if isinstance(config.get("head_type"), str) else None
        if kind in LANGUAGE:
            self._check_fields(config, ABOUT_LANGUAGE)
            self._compare(self._named(tensors, {0: "lm_head"}))
            return HubHead(None)
        if kind not in TASKS:
            self._refuse(
                "config.head_type", f"is {quoted(config.get('head_type'))}; served are {', '.join(TASKS)}; {WITHOUT}"
            )
            return HubHead(None)
        self._check_fields(config, READ)
        return self._of_task(TASKS[str(kind)], config, tensors)

    def _refuse(self, field: str, reason: str) -> None:
        self._verdict.refuse(f"{HEAD_CONFIG_FILE}: {field[:64]}", reason)

    def _check_fields(self, config: Mapping[str, Any], read: frozenset[str]) -> None:
        for name, value in config.items():
            if name not in read | INERT and value not in (None, False):
                self._refuse(f"config.{name}", "is a field that this server does not know and will not ignore")

    # a flexible head

    def _of_task(self, task: HeadTask, config: Mapping[str, Any], tensors: tuple[StoredTensor, ...]) -> HubHead:
        num_layers, activation = config.get("layers"), config.get("activation_function") or "linear"
        if type(num_layers) is not int or not 1 <= num_layers <= MAX_LAYERS:
            self._refuse("config.layers", f"is {quoted(num_layers)}; it must be an integer from 1 to {MAX_LAYERS}")
            return HubHead(None)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            self._refuse("config.activation_function", f"is {quoted(activation)}; it must be null or one of {known}")
            return HubHead(None)
        if self._base.shape.is_encoder_decoder:
            self._refuse(
                "config.head_type", f"is {quoted(config['head_type'])}; heads are not served on {self._base.family}"
            )
            return HubHead(None)
        step = 3 if config.get("activation_function") else 2  # a linear layer stands behind a dropout, and before one
        names = {1 + step * number: f"{FLEXIBLE}.{activation}.{number}" for number in range(num_layers)}
        if config.get("use_pooler"):
            return self._pooled(task, config, tensors)
        named = dict(self._named(tensors, names))
        form = flexible_form(task, named, is_encoder=self._base.shape.is_encoder)
        has_weights = all(f"{layer}.weight" in named for layer in names.values())
        if form is None or form.layers != tuple(names.values()) or not has_weights:
            self._refuse("config.layers", f"is {num_layers}, and {HEAD_WEIGHTS_FILE} holds other layers; {REMEDY}")
            return HubHead(None)
        self._check_layers(form, named, config)
        bound = BoundHead(task=task, form=form, tensors=named)
        return HubHead(bound, self._labels(config, bound))

    def _check_layers(self, form: HeadForm, named: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        size = self._base.shape.state_size
        for layer in form.layers:
            is_last = layer == form.layers[-1]
            weight, bias = named[f"{layer}.weight"], named.get(f"{layer}.bias")
            num_out = config.get("num_labels") if is_last else size
            wants_bias = not is_last or config.get("bias", True) is not False
            if weight.shape != (num_out, size) or (bias is not None and bias.shape != (num_out,)):
                self._refuse(
                    "config.num_labels", f"and base ask for [{quoted(num_out)}, {size}] at {quoted(weight.name)}"
                )
            if (bias is not None) != wants_bias:
                self._refuse("config.bias", f"does not agree with the tensors beside {quoted(weight.name)}; {REMEDY}")
            for tensor in (weight, bias):
                if tensor is not None and tensor.format.is_integer:
                    self._verdict.refuse(tensor.name, f"has dtype {tensor.format.torch_dtype}; {NOT_SERVED}")

    def _pooled(self, task: HeadTask, config: Mapping[str, Any], tensors: tuple[StoredTensor, ...]) -> HubHead:
        """One layer behind the base's own pooler is the head of transformers' class, where that has one."""
        forms = forms_of(self._base.family, task, is_encoder=self._base.shape.is_encoder)
        form = next((form for form in forms if len(form.layers) == 2 and form.layers[0].startswith(POOLER)), None)
        if form is None or config.get("layers") != 1 or config.get("bias", True) is False:
            self._refuse("config.use_pooler", "is served with one layer that has a bias, on models with a pooler")
            return HubHead(None)
        binder = HeadBinder(Config({"task_type": str(task)}), self._base, self._verdict)
        for key, tensor in self._named(tensors, {1: form.layers[-1]}):
            binder.add(key, tensor)
        bound = binder.bound()
        return HubHead(bound, self._labels(config, bound))

    def _labels(self, config: Mapping[str, Any], bound: BoundHead | None) -> tuple[str, ...]:
        given = config.get("label2id")
        if bound is None or given is None or bound.task is HeadTask.SPANS:
            return ()
        count = bound.facts.num_labels
        if isinstance(given, dict) and all(type(n) is int for n in given.values()):
            by_id = {number: name for name, number in given.items()}
            if sorted(by_id) == list(range(count)) and len(given) == count:
                return tuple(by_id[number] for number in range(count))
        self._refuse("config.label2id", f"must name each of the {count} outputs once, or be null")
        return ()

    def _named(
        self, tensors: tuple[StoredTensor, ...], layers: Mapping[int, str]
    ) -> Iterator[tuple[str, StoredTensor]]:
        """Tensors by the name of their layer; keys are `heads.<adapter>.<number>.weight` and `.bias`."""
        prefix = f"heads.{self._hub.name}."
        for tensor in tensors:
            number, _, suffix = tensor.name.removeprefix(prefix).partition(".")
            is_key = tensor.name.startswith(prefix) and number.isdecimal() and len(number) < 4
            layer = layers.get(int(number), "") if is_key else ""
            if layer and suffix in ("weight", "bias"):
                yield f"{layer}.{suffix}", tensor
            else:
                self._verdict.refuse(tensor.name, f"is no tensor of the head that {HEAD_CONFIG_FILE} describes")

    # a head of a class of transformers

    def _of_class(self, class_name: str, tensors: tuple[StoredTensor, ...]) -> HubHead:
        task = task_of_class(class_name)
        named = ((tensor.name, tensor) for tensor in tensors)
        if task is None:
            self._compare(named)
            return HubHead(None)
        binder = HeadBinder(Config({"task_type": str(task)}), self._base, self._verdict)
        for key, tensor in named:
            binder.add(key, tensor)
        return HubHead(binder.bound())

    def _compare(self, named: Iterator[tuple[str, StoredTensor]]) -> None:
        """A language model's head beside an adapter is the base's own, or it is refused."""
        for key, tensor in named:
            path, _, parameter = key.rpartition(".")
            site = site_path(path, self._base)
            spec = None if site is None else self._base.sites[site]
            if self._base.shape.is_encoder:
                self._verdict.warn(f"{quoted(tensor.name)} is of a language head, which nothing reads here")
            elif (
                spec is not None
                and spec.kind in HAS_WEIGHT
                and parameter in spec.parameters
                and tensor.shape == spec.parameters[parameter]
                and same_as_base(tensor, spec, parameter, self._base)
            ):
                self._verdict.warn(f"{quoted(tensor.name)} repeats the base's own values and is not read")
            else:
                self._verdict.refuse(
                    tensor.name,
                    f"is a language head other than the served base's; {WITHOUT}, or serve it on the base it was "
                    "trained on",
                )


def flexible_form(task: HeadTask, names: Iterable[str], *, is_encoder: bool) -> HeadForm | None:
    """The form of a flexible head, from the names of its parameters; None for any other head."""
    layers = sorted({name.rpartition(".")[0] for name in names}, key=lambda layer: (len(layer), layer))
    if not layers or not all(layer.startswith(f"{FLEXIBLE}.") for layer in layers):
        return None
    first = Reads.FIRST if is_encoder else Reads.LAST
    return HeadForm(
        reads=first if task is HeadTask.SEQUENCE else Reads.EVERY,
        layers=tuple(layers),
        activation=layers[0].split(".")[1],
        has_bias=f"{layers[-1]}.bias" in set(names),
    )
