"""Where the sublayers of a resident model are: the modules around each of their sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_serve.adapters.adapterhub.places import AFTER_LAYER, FAMILIES, Stack, Sublayer
from peft_serve.adapters.base import SiteKind, SiteSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """The modules of one site, and the path that says which tokens they see. A layer's own site has that alone."""

    spec: SiteSpec
    stream_path: str
    output: nn.Module | None = None  # None: the site is what enters `residual`, the first layer
    residual: nn.Module
    norm: nn.Module | None = None


def sublayers_of(model: nn.Module) -> Mapping[str, Around]:
    """The sublayer sites of a model by path; none for a model whose sublayers are not known."""
    config: Any = getattr(model, "config", None)
    stacks = FAMILIES.get(getattr(config, "model_type", ""), ())
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = _body_prefix(model)
    found = (around for stack in stacks for around in _sites_of(stack, prefix, modules))
    return {around.spec.path: around for around in found}


def _body_prefix(model: nn.Module) -> str:
    name = str(getattr(model, "base_model_prefix", ""))
    return f"{name}." if name and isinstance(getattr(model, name, None), nn.Module) else ""


def _sites_of(stack: Stack, prefix: str, modules: Mapping[str, nn.Module]) -> Iterator[Around]:
    layers = modules.get(prefix + stack.layers)
    if not isinstance(layers, nn.ModuleList):
        return
    for number, layer in enumerate(layers):
        inner = dict(layer.named_modules())
        for sublayer in stack.sublayers:
            around = _around(sublayer, f"{prefix}{stack.layers}.{number}.", inner)
            if around is not None:
                yield around
        size = _input_size(layer, stack)
        if size:
            path = f"{prefix}{stack.layers}.{number}"
            spec = _spec(f"{path}.{AFTER_LAYER}", size, SiteKind.LAYER)
            yield Around(spec=spec, stream_path=path, output=layer, residual=layer)
    first = f"{prefix}{stack.layers}.0"
    size = _input_size(modules[first], stack)
    if stack.invertible is not None and size and f"{prefix}embeddings_project" not in modules:
        yield Around(spec=_spec(prefix + stack.invertible, size), stream_path=first, residual=modules[first])


def _around(sublayer: Sublayer, prefix: str, inner: Mapping[str, nn.Module]) -> Around | None:
    output, residual = inner.get(sublayer.output), inner.get(sublayer.residual)
    norm = None if sublayer.norm is None else inner.get(sublayer.norm)
    size = 0 if output is None else _output_size(output)
    if output is None or residual is None or not size or (sublayer.norm is not None and norm is None):
        return None
    return Around(
        spec=_spec(prefix + sublayer.site, size),
        stream_path=prefix + sublayer.output,
        output=output,
        residual=residual,
        norm=norm,
    )


def _spec(path: str, size: int, kind: SiteKind = SiteKind.SUBLAYER) -> SiteSpec:
    return SiteSpec(path=path, kind=kind, out_features=size, in_features=size, parameters={})


_LAST = ("", "o_proj", "c_proj", "o", "out_proj", "out_lin", "lin2", "down_proj", "wo")


def _output_size(module: nn.Module) -> int:
    """The features that a sublayer gives: those of its last projection."""
    last = next((part for name in _LAST if isinstance(part := _part(module, name), nn.Module)), None)
    return 0 if last is None else _features(last)


def _part(module: nn.Module, name: str) -> object:
    if name:
        return getattr(module, name, None)
    return module if hasattr(module, "weight") else None


def _features(projection: nn.Module) -> int:
    """Output features of a Linear, of a quantised one too, or of a Conv1D."""
    size = getattr(projection, "out_features", None) or getattr(projection, "nf", 0)
    return size if isinstance(size, int) else 0


def _input_size(layer: nn.Module, stack: Stack) -> int:
    output = dict(layer.named_modules()).get(stack.sublayers[0].output)
    return 0 if output is None else _output_size(output)
