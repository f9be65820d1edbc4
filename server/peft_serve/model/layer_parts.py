"""A decoder layer in parts: runs of its kernel's stages, and what sites do in Python between them.

What a layer's sites do in a step follows from the manner in which its adapters act. Most of it the kernel does too; the
rest is done where the layer spelled out would do it, on the memory that the kernel's stages share. The others of the
step lose a crossing from Python, and nothing else.

Shapes: `T` tokens, `I` features, `H` query and `K` key/value heads, `D` head size or features of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from peft_serve.kernels.layer import NUM_PROJECTIONS, Memory, SiteTerms, Stage
from peft_serve.model.attention import RaggedAttention, Work
from peft_serve.model.attention_site import AttentionSite
from peft_serve.model.rotary_attention import RotaryAttention
from peft_serve.model.routing import Lane, Route
from peft_serve.model.site_ops import SitePart
from peft_serve.model.sites_forward import DenseSite, NormSite, Site
from peft_serve.model.sublayers import SublayerSite
from peft_serve.model.terms.term import OutTerm

STAGES: Final = (*[Stage.READ] * 3, Stage.WRITE, *[Stage.OPEN] * 2, Stage.CLOSE)
"""In which each projection is computed, in the kernel's order of projections."""
_ALL_IN_KERNEL: Final = SitePart(SiteTerms())


class Frame:
    """A layer while it runs over the tokens of a step."""

    __slots__ = ("attended_TD", "memory", "work", "x", "y", "y_TI")

    def __init__(self, work: Work, memory: Memory, x: Tensor, y: Tensor) -> None:
        self.work = work
        self.memory = memory
        self.x = x
        self.y = y  # what the layer gives, as far as it has come: from the output projection on
        self.y_TI = y.view(-1, y.shape[-1])
        self.attended_TD = memory.attended

    def entering(self, projection: int) -> Tensor:
        """[T, I] What a projection reads."""
        memory = self.memory
        return (*[memory.normed] * 3, self.attended_TD, *[memory.normed] * 2, memory.gate)[projection]

    def leaving(self, projection: int) -> Tensor:
        """[T, D] What it gives."""
        memory = self.memory
        return (memory.q, memory.k, memory.v, self.y_TI, memory.gate, memory.up, memory.normed)[projection]


Deed = Callable[[Frame], object]
"""What happens behind a stage."""


@dataclass(frozen=True, slots=True)
class Part:
    """The kernel's stages [first, last), and what happens behind them."""

    first: Stage
    last: Stage
    deeds: tuple[Deed, ...] = ()


WHOLE: Final = (Part(Stage.NORM_BEFORE, Stage.END),)


def cut(deeds: Mapping[Stage, Sequence[Deed]], *, attends: bool) -> tuple[Part, ...]:
    """The parts of a layer with these deeds behind its stages; with `attends`, attention is the kernel's too, and else
    among the deeds."""
    parts: list[Part] = []
    first = Stage.NORM_BEFORE
    for stage in (stage for stage in Stage if stage in deeds):
        is_deed = stage is Stage.ATTEND and not attends
        parts.append(Part(first, stage if is_deed else Stage(stage + 1), tuple(deeds[stage])))
        first = Stage(stage + 1)
    return (*parts, Part(first, Stage.END)) if first is not Stage.END else tuple(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attending:
    """Attention that is not the kernel's."""

    attention: RaggedAttention
    module: nn.Module
    rotary: RotaryAttention
    site: AttentionSite | None

    def __call__(self, frame: Frame) -> None:
        """Attend, and keep what is to be added behind the output projection."""
        if self.site is not None:
            self.site.begin()
        memory, rotary = frame.memory, self.rotary
        q, k, v = (its.view(len(its), -1, rotary.head) for its in (memory.q, memory.k, memory.v))
        attended = self.attention.run(self.module, frame.work, rotary.layer, q, k, v, rotary.terms)
        frame.attended_TD = attended.reshape(len(attended), -1).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What is inside of a layer."""

    attention: RotaryAttention
    projections: tuple[DenseSite, ...]  # in the kernel's order
    norms: tuple[NormSite | None, ...]  # in the kernel's order
    prompts: AttentionSite | None
    sublayers: tuple[SublayerSite | None, SublayerSite | None]  # of attention, and of the gated layer
    behind: frozenset[Site]  # what acts on all that leaves the layer, and so behind it
    lane: Lane  # of all the others

    def parts(self, route: Route | None, acting: frozenset[Site]) -> tuple[SitePart, ...]:
        """How the kernel and the sites of the projections share the work of a route with these sites acting."""
        if route is None:
            return (_ALL_IN_KERNEL,) * NUM_PROJECTIONS
        return tuple(site.dense.part(route) if site in acting else _ALL_IN_KERNEL for site in self.projections)

    def gains(self, route: Route | None) -> tuple[Tensor | None, ...]:
        """The adapters' own gains by norm, tables by slot."""
        return tuple(None if site is None or route is None else site.gains(route) for site in self.norms)

    def deeds(self, parts: Sequence[SitePart], acting: frozenset[Site]) -> dict[Stage, list[Deed]]:
        """What is left to the sites, by the stage behind which it happens, in order; attention is not among it."""
        deeds: dict[Stage, list[Deed]] = {}
        for stage, deed in (*self._of_projections(parts), *self._around(acting)):
            deeds.setdefault(stage, []).append(deed)
        return deeds

    def _of_projections(self, parts: Sequence[SitePart]) -> Iterator[tuple[Stage, Deed]]:
        for number, (site, part) in enumerate(zip(self.projections, parts, strict=True)):
            if part.terms.is_elsewhere:
                yield STAGES[number], _computing(site, number)
            elif part.left:
                yield STAGES[number], _finishing(site, number, part.left)

    def _around(self, acting: frozenset[Site]) -> Iterator[tuple[Stage, Deed]]:
        prompts, (attention, gated) = self.prompts, self.sublayers
        if prompts is not None and prompts in acting:
            yield Stage.WRITE, lambda frame: prompts.add_late_(frame.y_TI)
        if attention is not None and attention in acting:
            yield Stage.WRITE, lambda frame: attention.change_(frame.y_TI, frame.x.view(frame.y_TI.shape))
        if gated is not None and gated in acting:
            yield Stage.CLOSE, lambda frame: gated.change_(frame.memory.normed, frame.y_TI)


def _computing(site: DenseSite, number: int) -> Deed:
    return lambda frame: frame.leaving(number).copy_(site.forward(frame.entering(number)))


def _finishing(site: DenseSite, number: int, left: tuple[OutTerm, ...]) -> Deed:
    return lambda frame: site.finish_(frame.leaving(number), frame.entering(number), left)
