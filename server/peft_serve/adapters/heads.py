"""Task heads: what the modules behind the body of a model compute, and which tensors of a checkpoint are one.

Owns the table of heads by family, and the check of a checkpoint's head against the base. Knows no arithmetic: the
model floor runs a `HeadForm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from peft_serve.adapters.base import Base, SiteSpec
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.header import StoredTensor
from peft_serve.adapters.paths import site_path
from peft_serve.adapters.primitives import HeadTask
from peft_serve.adapters.records import CONFIG_FILE, HeadFacts
from peft_serve.adapters.targets import is_saved
from peft_serve.adapters.verdict import Verdict, quoted

HEADS: Final = frozenset({"score", "classifier", "pre_classifier", "classification_head", "qa_outputs"})
"""Names of the modules that task classes put behind the body."""

POOLER: Final = "pooler"
WRAPPERS: Final = (".modules_to_save.", ".original_module.")  # peft's own wrappers, saved twice by bias="all"


class Reads(StrEnum):
    """Which of the last hidden states a head looks at."""

    FIRST = "first"
    LAST = "last"
    EVERY = "every"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """The modules of a task's class behind the body, in order, by their paths there."""

    reads: Reads
    layers: tuple[str, ...]
    activation: str = "linear"  # between two layers; a key of transformers' ACT2FN
    has_bias: bool = True  # of the last layer


def _first(*layers: str, activation: str) -> HeadForm:
    return HeadForm(reads=Reads.FIRST, layers=layers, activation=activation)


def _every(layer: str) -> HeadForm:
    return HeadForm(reads=Reads.EVERY, layers=(layer,))


_SEQUENCE_FORMS: Final[Mapping[str, HeadForm]] = MappingProxyType(
    {
        "bert": _first("pooler.dense", "classifier", activation="tanh"),
        **dict.fromkeys(
            ("roberta", "xlm-roberta", "camembert"),
            _first("classifier.dense", "classifier.out_proj", activation="tanh"),
        ),
        "distilbert": _first("pre_classifier", "classifier", activation="relu"),
        "electra": _first("classifier.dense", "classifier.out_proj", activation="gelu"),
        "deberta-v2": _first("pooler.dense", "classifier", activation="gelu"),
    }
)
"""Of encoders, by family: transformers' `...ForSequenceClassification`."""

_SCORE: Final = HeadForm(reads=Reads.LAST, layers=("score",), has_bias=False)


def forms_of(family: str, task: HeadTask, *, is_encoder: bool) -> tuple[HeadForm, ...]:
    """The heads that transformers' classes for this task have in this family; none if it is not served there."""
    if task is HeadTask.SPANS:
        return (_every("qa_outputs"),)
    if task is HeadTask.TOKENS:
        return (_every("classifier"),) if is_encoder else (_every("score"), _every("classifier"))
    if not is_encoder:
        return (_SCORE,)
    return (_SEQUENCE_FORMS[family],) if family in _SEQUENCE_FORMS else ()


_CLASS_ENDINGS: Final[Mapping[str, HeadTask]] = MappingProxyType(
    {
        "ForSequenceClassification": HeadTask.SEQUENCE,
        "ForTokenClassification": HeadTask.TOKENS,
        "ForQuestionAnswering": HeadTask.SPANS,
    }
)


def task_of_class(class_name: str) -> HeadTask | None:
    """The task of a transformers class, by its name."""
    return next((task for ending, task in _CLASS_ENDINGS.items() if class_name.endswith(ending)), None)


def own_form(base: Base) -> tuple[HeadTask, HeadForm] | None:
    """The base's own task head, if its class has one that is served."""
    task = task_of_class(base.class_name)
    if task is None:
        return None
    for form in forms_of(base.family, task, is_encoder=base.shape.is_encoder):
        if all(site_path(layer, base) is not None for layer in form.layers):
            return task, form
    return None


def own_facts(base: Base) -> HeadFacts | None:
    """The base's own task head in numbers."""
    own = own_form(base)
    if own is None:
        return None
    task, form = own
    path = site_path(form.layers[-1], base)
    assert path is not None, "an own form has all its layers in the base"
    return HeadFacts(str(task), base.sites[path].out_features)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundHead:
    """A checkpoint's task head, tied to its form. Layers without a tensor here are the base's own modules."""

    task: HeadTask
    form: HeadForm
    tensors: Mapping[str, StoredTensor]  # `<layer>.weight`, `<layer>.bias`

    @property
    def facts(self) -> HeadFacts:
        return HeadFacts(str(self.task), self.tensors[f"{self.form.layers[-1]}.weight"].shape[0])


@dataclass(slots=True)
class HeadBinder:
    """Collects the head tensors of one checkpoint; refusals go to `verdict`."""

    config: Config
    base: Base
    verdict: Verdict
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def takes(self, key: str, path: str | None) -> bool:
        """Whether a key, without peft's prefix, is of a head; `path` is the site of the base it would name."""
        root = key.partition(".")[0]
        if root not in HEADS and root != POOLER:
            return False
        return path is None or (root in HEADS and is_saved(path, self.config.names("modules_to_save")))

    def add(self, key: str, tensor: StoredTensor) -> None:
        """Keep a tensor of the head; what peft's wrappers leave behind is told and not read."""
        if any(wrapper in f".{key}" for wrapper in WRAPPERS) and self.config.text("bias") == "all":
            self.verdict.warn(f"{quoted(tensor.name)} is a leftover of bias='all' and is not read")
        elif tensor.format.is_integer:
            self.verdict.refuse(tensor.name, "is a task head and holds integers; save it as floating-point numbers")
        else:
            self.tensors[key] = tensor

    def bound(self) -> BoundHead | None:
        """The head, or None when the checkpoint brings none; whole and of the right shapes once the verdict settles."""
        task = self._task()
        if task is None:
            self._refuse_all()
            return None
        if self.base.shape.is_encoder_decoder:
            self._refuse_task(
                task,
                f"is a task head; the served base {self.base.class_name} is an encoder-decoder, whose heads are not "
                "served; train on an encoder or a decoder-only base, or as SEQ_2_SEQ_LM",
            )
            return None
        form = self._form(task)
        if form is None:
            return None
        self._check_layers(task, form)
        if len(self.tensors[f"{form.layers[-1]}.weight"].shape) != 2:
            return None  # refused; it has no number of labels to tell
        return BoundHead(task=task, form=form, tensors=self.tensors)

    def _task(self) -> HeadTask | None:
        named = self.config.text("task_type")
        if named:
            return HeadTask(named) if named in set(HeadTask) else None
        if not self.tensors:
            return None
        trained = self.config.raw("auto_mapping")
        class_name = trained.get("base_model_class") if isinstance(trained, dict) else None
        own = task_of_class(self.base.class_name)
        return (task_of_class(class_name) if isinstance(class_name, str) else None) or own

    def _refuse_all(self) -> None:
        """Tensors of a head without a task for it; a pooler that no reading asks for is harmless."""
        for key, tensor in self.tensors.items():
            if key.startswith(f"{POOLER}."):
                self.verdict.warn(f"{quoted(tensor.name)} acts on a pooler that nothing reads here")
            else:
                task = self.config.text("task_type") or "empty"
                self.verdict.refuse(
                    tensor.name,
                    f"is a task head and task_type of {CONFIG_FILE} is {task}; the task types of heads are "
                    f"{', '.join(HeadTask)}; name the one it was trained for",
                )

    def _refuse_task(self, task: HeadTask, reason: str) -> None:
        place = next((t.name for t in self.tensors.values()), f"{CONFIG_FILE}: task_type")
        self.verdict.refuse(place, f"({task}) {reason}")

    def _form(self, task: HeadTask) -> HeadForm | None:
        forms = forms_of(self.base.family, task, is_encoder=self.base.shape.is_encoder)
        if not forms:
            self._refuse_task(
                task,
                f"is a task head; those of {self.base.family} models are not served for this task; "
                f"served are {', '.join(_SEQUENCE_FORMS)}",
            )
            return None
        for form in forms:
            if f"{form.layers[-1]}.weight" in self.tensors:
                return form
        own = own_form(self.base)
        if own is None or own[0] is not task:
            names = " or ".join(f"{form.layers[-1]}.weight" for form in forms)
            self._refuse_task(
                task,
                f"needs a task head; the checkpoint has no {names} and the served base {self.base.class_name} no head "
                "of its own; save it again with its head in modules_to_save",
            )
        self._refuse_rest(())
        return None

    def _check_layers(self, task: HeadTask, form: HeadForm) -> None:
        width = self.base.shape.state_size
        for layer in form.layers:
            weight = self.tensors.get(f"{layer}.weight")
            if weight is not None:
                needs_bias = form.has_bias or layer != form.layers[-1]
                width = self._check_layer(layer, weight, width, needs_bias=needs_bias)
                continue
            spec = self._own_layer(layer)
            if spec is None:
                self.verdict.refuse(
                    f"{layer}.weight",
                    f"is missing: the task head {task} of {self.base.family} models runs through it, and the served "
                    f"base {self.base.class_name} has none; save it with modules_to_save, or serve the base with its "
                    "own head",
                )
                return
            width = spec.out_features
        if task is HeadTask.SPANS and width != 2:
            self.verdict.refuse(form.layers[-1], f"gives {width} numbers; a start and an end make two")
        self._refuse_rest(form.layers)

    def _check_layer(self, layer: str, weight: StoredTensor, width: int, *, needs_bias: bool) -> int:
        """The layer's number of outputs; `width` is that of its inputs."""
        if len(weight.shape) != 2 or weight.shape[1] != width or weight.shape[0] < 1:
            self.verdict.refuse(
                weight.name,
                f"has shape {list(weight.shape)}; a task head here has [labels, {width}]; serve it on the base it was "
                "trained on",
            )
            return width
        bias = self.tensors.get(f"{layer}.bias")
        if bias is None and needs_bias:
            self.verdict.refuse(f"{layer}.bias", "is missing; save the checkpoint again with peft")
        if bias is not None and bias.shape != weight.shape[:1]:
            self.verdict.refuse(bias.name, f"has shape {list(bias.shape)}; its weight asks for {[weight.shape[0]]}")
        return weight.shape[0]

    def _own_layer(self, layer: str) -> SiteSpec | None:
        path = site_path(layer, self.base)
        return None if path is None else self.base.sites[path]

    def _refuse_rest(self, layers: tuple[str, ...]) -> None:
        known = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
        for key in self.tensors.keys() - known:
            self.verdict.refuse(
                self.tensors[key].name,
                f"is not a part of this task head on {self.base.family} models, which is made of "
                f"{', '.join(layers) or 'modules of the base'}; save the checkpoint again with peft",
            )
