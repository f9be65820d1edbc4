"""Which sites a config says it is about, worked out without running a single regular expression of it.

The tensors' keys are what counts; where the config is plain enough to be understood, it must agree with them, so
that a truncated or a mislabelled checkpoint is refused and not served by half. `None` means: the keys decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft_serve.adapters.base import Base
from peft_serve.adapters.config_schema import LITERAL, Config
from peft_serve.adapters.paths import site_path


def is_named(path: str, names: frozenset[str]) -> bool:
    """Whether a path is one of the names or ends with `.name`, as peft matches lists of modules."""
    parts = path.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


def ancestors(path: str) -> Iterator[str]:
    """The path and every module it lies in, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def is_saved(path: str, saved: Sequence[str]) -> bool:
    """Whether `modules_to_save` covers a module; peft matches the end of a name, without regard to dots."""
    return bool(saved) and any(prefix.endswith(tuple(saved)) for prefix in ancestors(path))


def tie_partners(base: Base, path: str) -> frozenset[str]:
    """The other sites that share this site's weight."""
    return frozenset().union(*(group for group in base.tied if path in group)) - {path}


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """The sites a config speaks of: those that must have tensors, and those that may; `None`: the keys decide."""

    must: frozenset[str] = frozenset()
    may: frozenset[str] | None = frozenset()


def named_by_modules(config: Config, base: Base) -> Named:
    """What `target_modules` says, where it can be read at all."""
    named = named_sites(config, base)
    return Named(may=None) if named is None else Named(must=named)


def named_sites(config: Config, base: Base) -> frozenset[str] | None:
    """The sites that `target_modules` names less what is excluded, or None when that takes a regular expression."""
    targets = config.raw("target_modules")
    excluded = config.raw("exclude_modules") or []
    if not isinstance(targets, list) or not isinstance(excluded, list):
        return None
    wanted = _Layers.of(config)
    if wanted is None:
        return None
    target_set, excluded_set = _respelt(targets, base), _respelt(excluded, base)
    saved = config.names("modules_to_save")
    return frozenset(
        path
        for path in base.sites
        if is_named(path, target_set)
        and not is_named(path, excluded_set)
        and not any(is_named(prefix, frozenset(saved)) for prefix in ancestors(path))
        and (path in target_set or wanted.holds(path))
    )


def _respelt(names: Sequence[str], base: Base) -> frozenset[str]:
    """The names, and the served paths that whole paths among them mean."""
    whole = (site_path(name, base) for name in names if "." in name)
    return frozenset((*names, *(path for path in whole if path is not None)))


class _Layers:
    """`layers_to_transform` and `layers_pattern`: which numbered layers a target counts in."""

    def __init__(self, numbers: frozenset[int] | None, containers: tuple[str, ...]) -> None:
        self._numbers = numbers
        self._containers = containers

    @classmethod
    def of(cls, config: Config) -> _Layers | None:
        numbers = config.raw("layers_to_transform")
        containers = config.raw("layers_pattern") or []
        names = containers if isinstance(containers, list) else [containers]
        if not all(isinstance(name, str) and LITERAL.fullmatch(name) for name in names):
            return None
        if numbers is None or numbers == []:
            return cls(None, ())
        listed = numbers if isinstance(numbers, list) else [numbers]
        return cls(frozenset(int(str(number)) for number in listed), tuple(str(name) for name in names))

    def holds(self, path: str) -> bool:
        if self._numbers is None:
            return True
        number = self._number(path.split("."))
        return number is not None and number in self._numbers

    def _number(self, parts: list[str]) -> int | None:
        """The first number that follows a container's name; any name counts where no container is given."""
        for i in range(1 if self._containers else 2, len(parts) - 1):
            before = ".".join(parts[:i])
            fits = not self._containers or is_named(before, frozenset(self._containers))
            if parts[i].isdecimal() and fits:
                return int(parts[i])
        return None
