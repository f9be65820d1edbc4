"""What the life of adapters is to a caller: names, versions, aliases, and requests that hold what they resolved.

The model against which the server is driven by `test_api_lifecycle`. It knows no file, no slot and no thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Target = tuple[str, int | None]


@dataclass
class Model:
    """Statuses are HTTP's."""

    versions: dict[str, dict[int, str]] = field(default_factory=dict)  # of names that exist: digest by number
    current: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)  # of versions, or revisions, that a name has had
    aliases: dict[str, list[tuple[int, list[Target]]]] = field(default_factory=dict)  # revisions, oldest first
    revision: dict[str, int] = field(default_factory=dict)
    held: dict[int, str] = field(default_factory=dict)  # digest by request in flight

    def upload(self, name: str, digest: str) -> int:
        if name in self.aliases:
            return 409
        if name in self.current and self.versions[name][self.current[name]] == digest:
            return 200
        self.current[name] = self.counters[name] = self.counters.get(name, 0) + 1
        self.versions.setdefault(name, {})[self.current[name]] = digest
        return 201

    def delete(self, name: str, *, force: bool) -> int:
        if name not in self.current:
            return 404
        using = [alias for alias in self.aliases if any(adapter == name for adapter, _ in self.pointed(alias))]
        if using and not force:
            return 409
        for alias in using:
            rest = [target for target in self.pointed(alias) if target[0] != name]
            if rest:
                self.point(alias, rest)
            else:
                self.forget(alias)
        digests = self.versions.pop(name).values()
        del self.current[name]
        return 202 if set(digests) & set(self.held.values()) else 204

    def rollback(self, name: str, number: int) -> int:
        if number not in self.versions.get(name, {}):
            return 404
        self.current[name] = number
        return 200

    def pointed(self, alias: str) -> list[Target]:
        return dict(self.aliases[alias])[self.revision[alias]]

    def put_alias(self, name: str, targets: list[Target]) -> int:
        if name in self.current:
            return 409
        if not self.are_there(targets):
            return 404
        is_new = name not in self.aliases
        if is_new or self.pointed(name) != targets:
            self.point(name, targets)
        return 201 if is_new else 200

    def point(self, name: str, targets: list[Target]) -> None:
        self.revision[name] = self.counters[name] = self.counters.get(name, 0) + 1
        self.aliases.setdefault(name, []).append((self.revision[name], targets))

    def roll_alias_back(self, name: str, number: int) -> int:
        if number not in dict(self.aliases.get(name, [])) or not self.are_there(dict(self.aliases[name])[number]):
            return 404
        self.revision[name] = number
        return 200

    def forget(self, name: str) -> int:
        self.revision.pop(name, None)
        return 404 if self.aliases.pop(name, None) is None else 204

    def are_there(self, targets: list[Target]) -> bool:
        return all(a in self.current and (n is None or n in self.versions[a]) for a, n in targets)

    def answers(self, name: str, number: int | None = None) -> set[str]:
        """Digests that may answer to a name; none: 404."""
        if name in self.aliases and number is None:
            return {digest for adapter, n in self.pointed(name) for digest in self.answers(adapter, n)}
        number = self.current.get(name) if number is None else number
        return {digest for n, digest in self.versions.get(name, {}).items() if n == number}
