"""The file of keys and tenants: YAML (so JSON too), read whole and checked whole, to principals by the hash of a token.

    tenants:
      support: {weight: 2, requests_per_s: 20, tokens_per_min: 60000, max_adapters: 50}
    keys:
      - {tenant: support, key: "sha256:..", scopes: [infer, upload], adapters: ["support-*"], base: true}

The file holds the sha256 of each token and never a token. A token is 256 random bits: nobody finds it by guessing, so
the hash needs neither salt nor slowness, which are for what people make up. No message quotes a value of the file: by
mistake it may be a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_serve.adapters.names import is_name
from peft_serve.api.principal import Principal, Quota, Reach, Scope, Tenant

MAX_FILE_BYTES: Final = 4 << 20
MAX_PROBLEMS: Final = 10
NO_KEYS: Final = "no keys: every request with a key is refused"
"""What a file says that withdraws every key on purpose."""
HASH: Final = re.compile(r"sha256:[0-9a-f]{64}")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of tenants: they are labels of metrics and words of log lines."""


class KeyFileInvalid(ValueError):  # noqa: N818  named as a refusal, like those of `errors`
    """The file contradicts a rule."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class TenantEntry(_Entry):
    """A tenant's share and quotas."""

    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    requests_per_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    tokens_per_min: Annotated[int, Field(ge=1)] | None = None
    max_adapters: Annotated[int, Field(ge=0)] | None = None
    max_bytes: Annotated[int, Field(ge=0)] | None = None


class KeyEntry(_Entry):
    """A key: whose it is, the hash of its token, and what it allows."""

    tenant: str
    key: str
    scopes: Annotated[list[Scope], Field(min_length=1)]
    adapters: list[str] = Field(default_factory=list)
    base: bool = True
    note: str = ""  # for people


class KeyFile(_Entry):
    """The whole file."""

    tenants: dict[str, TenantEntry] = Field(default_factory=dict)
    keys: list[KeyEntry] = Field(default_factory=list)


def hash_of(token: str) -> bytes:
    """What is kept of a token."""
    return sha256(token.encode()).digest()


def read_keys(content: bytes, *, note: Callable[[str], None] = lambda _: None) -> dict[bytes, Principal]:
    """The principals of a file, by the hash of their token. Raises KeyFileInvalid, with every problem in its words.

    A file withdraws every key by saying so, `keys: []`; one that says nothing of keys was cut short or made empty by
    mistake. `note` hears of what is odd and no mistake by itself: of that, and of a tenant without a key, which is what
    is left when its last one is withdrawn.
    """
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileInvalid(f"has more than {MAX_FILE_BYTES} bytes")
    try:
        parsed = yaml.load(content, Loader=_Strict)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" (line {mark.line + 1})"
        reason = error.problem if isinstance(error, _Refused) else "its words are in a wrong place"
        raise KeyFileInvalid(f"is not YAML{where}: {reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        raise KeyFileInvalid("is not YAML") from None
    try:
        file = KeyFile.model_validate(_with_keys(parsed))
    except ValidationError as error:
        raise KeyFileInvalid(_told([(_place(each["loc"]), each["msg"]) for each in error.errors()])) from None
    problems = [*_tenant_problems(file), *_key_problems(file)]
    if problems:
        raise KeyFileInvalid(_told(problems))
    if not file.keys:
        note(NO_KEYS)
    for name in sorted(file.tenants.keys() - {entry.tenant for entry in file.keys}):
        note(f"tenants.{_safe(name)}: no key is this tenant's")
    tenants = {name: _tenant(name, entry) for name, entry in file.tenants.items()}
    return {
        bytes.fromhex(entry.key.removeprefix("sha256:")): Principal(
            tenant=tenants.get(entry.tenant) or Tenant(name=entry.tenant),
            scopes=frozenset(entry.scopes),
            reach=Reach.of(entry.adapters),
            may_ask_base=entry.base,
        )
        for entry in file.keys
    }


def _with_keys(parsed: Any) -> dict[str, Any]:
    """What a file says, where it is one of keys at all. Raises KeyFileInvalid."""
    if parsed is None:
        raise KeyFileInvalid("is empty; it has to say `keys:`, and `keys: []` withdraws every key")
    if not isinstance(parsed, dict):
        what = "a list" if isinstance(parsed, list) else "one value"
        raise KeyFileInvalid(
            f"is {what}; it has to be a mapping with `keys:` (a list of entries), and maybe `tenants:`"
        )
    if not parsed.keys() - {"tenants"}:
        raise KeyFileInvalid("has no `keys:`; list the keys below it, or say `keys: []` to withdraw every one")
    return parsed


def _tenant(name: str, entry: TenantEntry) -> Tenant:
    limits = entry.model_dump(exclude={"weight"})
    return Tenant(name=name, weight=entry.weight, quota=Quota(**limits))


def _tenant_problems(file: KeyFile) -> list[tuple[str, str]]:
    problems = []
    for name, entry in file.tenants.items():
        if not NAME.fullmatch(name):
            problems.append((f"tenants.{_safe(name)}", "a name is 1 to 64 letters, digits, '.', '_' or '-'"))
        if entry.burst is not None and entry.requests_per_s is None:
            problems.append((f"tenants.{_safe(name)}.burst", "says nothing without requests_per_s"))
    return problems


def _key_problems(file: KeyFile) -> list[tuple[str, str]]:
    problems = []
    seen: dict[str, int] = {}
    for i, entry in enumerate(file.keys):
        place = f"keys.{i}"
        if not NAME.fullmatch(entry.tenant):
            problems.append((f"{place}.tenant", "a name is 1 to 64 letters, digits, '.', '_' or '-'"))
        if not HASH.fullmatch(entry.key):
            problems.append((f"{place}.key", "is no sha256:<64 hex digits>; `peft-serve keys new` makes one"))
        elif entry.key in seen:
            problems.append((f"{place}.key", f"is the key of keys.{seen[entry.key]} as well"))
        seen.setdefault(entry.key, i)
        if not all(is_name(each.removesuffix("*") or "x") for each in entry.adapters):
            problems.append((f"{place}.adapters", "holds names of adapters, and beginnings of names with a * behind"))
    return problems


def _place(loc: tuple[Any, ...]) -> str:
    return ".".join(_safe(str(each)) for each in loc) or "file"


def _safe(name: str) -> str:
    """A key of the file, where it is one that may be shown: it could be a token in the wrong place."""
    known = {*KeyFile.model_fields, *KeyEntry.model_fields, *TenantEntry.model_fields}
    return name if name in known or len(name) <= 32 else f"{name[:4]}.."


def _told(problems: list[tuple[str, str]]) -> str:
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(f"{place}: {reason}" for place, reason in problems[:MAX_PROBLEMS]) + more


class _Refused(yaml.MarkedYAMLError):
    """A rule of ours; YAML's own words may quote the file."""


class _Strict(yaml.SafeLoader):
    """No key twice: the second would silently count; and no aliases, which can make much of little."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise _Refused(None, None, "aliases are not read here", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(None, None, "names are words", key.start_mark)
            if key.value in seen:
                raise _Refused(None, None, "a name is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def entry_text(entry: Mapping[str, Any]) -> str:
    """A key's entry as it stands in the file."""
    return yaml.safe_dump([dict(entry)], sort_keys=False, default_flow_style=None, width=200)
