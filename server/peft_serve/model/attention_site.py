"""An attention module as a site: learned prompts of adapters, read beside the tokens' own context.

The library's attention interface gives queries to `RaggedAttention`, which tells the site of the module what it
got (`beside_`). What goes through the output projection is added there; what does not, when the module returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.model.routing import Lane, Route
from peft_serve.model.sites_forward import expect_tokens
from peft_serve.model.terms.gated import GatedPrompts, Part
from peft_serve.model.terms.term import Term

Forward = Callable[..., Any]


class AttentionSite:
    """A decoder's self-attention."""

    def __init__(self, spec: SiteSpec, module: nn.Module, lane: Lane, like: Tensor) -> None:
        self.lane = lane
        config: Any = module.config
        self._prompts = GatedPrompts(
            spec.path,
            like.to(next(module.parameters()).device),
            head_dim=int(module.head_dim),  # type: ignore[arg-type]  # `attention_spec` has seen it
            num_heads=config.num_attention_heads,
        )
        self.terms: tuple[Term, ...] = (self._prompts,)
        self._path = spec.path
        self._base: Forward = module.forward
        self._planned: Route | None = None
        self._parts: tuple[Part, ...] = ()
        self._late: list[tuple[Part, Tensor]] = []

    def run_by(self, forward: Forward) -> None:
        """Run the module by another forward that gives what its own gives."""
        self._base = forward

    def forget(self) -> None:
        self._parts, self._planned = (), None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own; its first output gets what is added behind the output projection."""
        self.begin()
        out = self._base(*args, **kwargs)
        if not self._late:
            return out
        y_TD = out[0].clone().view(-1, out[0].shape[-1])
        self.add_late_(y_TD)
        return (y_TD.view(out[0].shape), *out[1:])

    def begin(self) -> None:
        """Nothing is kept of a pass that broke off."""
        self._late = []

    def add_late_(self, y_TD: Tensor) -> None:
        """Add to the module's first output what does not go through the output projection."""
        late, self._late = self._late, []
        for part, seen in late:
            part.add_(y_TD, seen)

    def beside_(self, q_TQD: Tensor, attended_TQD: Tensor) -> None:
        """Add what the prompts give to what attention gave, or keep it for the module's return."""
        route = self.lane.route
        if route is None:
            return
        if route is not self._planned:
            self._parts, self._planned = self._prompts.op(route), route
        for part in self._parts:
            expect_tokens(self._path, q_TQD.shape[0], route.num_tokens)
            seen = part.of(q_TQD)
            if part.is_projected:
                part.add_(attended_TQD, seen)
            else:
                self._late.append((part, seen))


def attention_spec(path: str, module: nn.Module) -> SiteSpec | None:
    """The site, if this is the self-attention of a decoder with projections of the kinds of Llama and GPT-2."""
    config = getattr(module, "config", None)
    children = {name for name, _ in module.named_children()}
    is_known = {"q_proj", "k_proj", "v_proj", "o_proj"} <= children or {"c_attn", "c_proj"} <= children
    is_cross = bool(getattr(module, "is_cross_attention", False))
    if (
        config is None
        or not is_known
        or is_cross
        or not hasattr(module, "head_dim")
        or not hasattr(module, "layer_idx")
    ):
        return None
    hidden_size = int(config.hidden_size)
    return SiteSpec(
        path=path, kind=SiteKind.ATTENTION, out_features=hidden_size, in_features=hidden_size, parameters={}
    )
