"""The metrics page without what a key may not see: the series of other adapters and of other tenants.

Works on Prometheus' text format, a line at a time. Figures of the server as a whole stay.
"""

from __future__ import annotations

import re
from typing import Final

from peft_serve.api.principal import Principal

_LABEL: Final = re.compile(r'(?P<name>[a-zA-Z_][a-zA-Z0-9_]*)="(?P<value>(?:[^"\\]|\\.)*)"')
_LISTS: Final = frozenset({"running_lora_adapters", "waiting_lora_adapters"})
_NOT_ONE: Final = frozenset({"base", "_other"})
"""Values of the label `adapter` that are the name of none."""


def seen_page(page: bytes, principal: Principal) -> bytes:
    """What of the page the principal may see."""
    if principal.is_operator:
        return page
    lines = (_seen_line(line, principal) for line in page.decode().splitlines(keepends=True))
    return "".join(line for line in lines if line is not None).encode()


def _seen_line(line: str, principal: Principal) -> str | None:
    if line.startswith("#") or "{" not in line:
        return line
    labels = {found["name"]: found["value"] for found in _LABEL.finditer(line)}
    adapter, tenant = labels.get("adapter", labels.get("adapter_name")), labels.get("tenant")
    if adapter is not None and adapter not in _NOT_ONE and not principal.sees_all_of(adapter):
        return None
    if "alias" in labels and not principal.sees_all_of(labels["alias"]):
        return None
    if tenant is not None and tenant != principal.tenant.name:
        return None
    if _LISTS.isdisjoint(labels):
        return line
    return _LABEL.sub(lambda found: _seen_names(found, principal), line)


def _seen_names(found: re.Match[str], principal: Principal) -> str:
    if found["name"] not in _LISTS:
        return found[0]
    names = ",".join(each for each in found["value"].split(",") if each and principal.sees_all_of(each))
    return f'{found["name"]}="{names}"'
