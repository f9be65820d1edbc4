"""The table of methods in docs/adapter-formats.md: made from the registry and from what was measured.

    python -m tests.documents.formats_table measure    compare every method with peft; writes docs/exactness.json
    python -m tests.documents.formats_table write      renew the table in docs/adapter-formats.md

`measure` compiles freshly made checkpoints and compares their logits with peft's, as the parity tests do; a test
holds the document to the two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.primitives import Adapter, Affine
from tests.adapters.checkpoints import VOCAB, make_base, make_checkpoint, methods_for, oracle_logits
from tests.adapters.fake_base import FakeBase, adapted_logits

DOCS: Final = Path(__file__).parents[2] / "docs"
MEASURED: Final = DOCS / "exactness.json"
PAGE: Final = DOCS / "adapter-formats.md"
BEGIN: Final = "<!-- methods: made by tests/documents/formats_table.py -->"
END: Final = "<!-- end of methods -->"
KINDS: Final = ("llama", "gpt2", "t5")
NO_FORWARD: Final = frozenset({("t5", "multitask_prompt_tuning")})
"""peft's forward is for training there; what it generates is compared elsewhere."""
SMALLEST: Final = 1e-7  # what float32 rounding alone gives; anything below is the same statement


@dataclass(frozen=True, slots=True)
class Term:
    """A kind of term: what readers call it, multiply-adds per token, numbers held."""

    words: str
    work: str
    held: str


TERMS: Final[Mapping[str, Term]] = {
    "delta": Term("low rank", "r (i + o)", "r (i + o)"),
    "Rescaled": Term("shared low rank", "r (i + o)", "r + o"),
    "SharedBases": Term("shared bases", "i o + s s", "s s / r, s: the smaller of i and o"),
    "Dense": Term("matrix", "i o", "i o"),
    "Kronecker": Term("Kronecker product", "see below", "its two factors"),
    "Sparse": Term("sparse matrix", "n", "3 n"),
    "Circulant": Term("circulant blocks", "i o / k, and transforms", "i o / k"),
    "Spectrum": Term("sparse spectrum", "n, and transforms", "3 n"),
    "in_scale": Term("input scale", "i", "i"),
    "out_scale": Term("output scale", "o", "o"),
    "in_mix": Term("block-diagonal input mix", "k i", "k i"),
    "out_mix": Term("output mix", "2 o, or k o", "2 o, or k o"),
    "rows": Term("exchanged rows", "a lookup", "n d"),
    "shift": Term("shift", "o", "o"),
    "Replace": Term("replaced parameters", "the layer's own", "the layer's own"),
    "Experts": Term("low rank per expert", "r (i + o) per expert hit", "E r (i + o)"),
    "GatedPrompt": Term("gated prompt", "2 P d", "2 P d"),
    "prompt": Term("soft prompt", "P positions of KV", "P d"),
    "prefix": Term("key/value prefix", "P positions of KV", "2 P L d"),
}


def terms_of(adapter: Adapter) -> set[str]:
    """The kinds of term an adapter has."""
    found = {name for name in ("prompt", "prefix") if getattr(adapter, name) is not None}
    for edit in adapter.sites.values():
        if isinstance(edit, Affine):
            names = ("delta", "in_scale", "in_mix", "out_scale", "out_mix", "rows", "shift")
            found |= {name for name in names if getattr(edit, name) is not None}
            found |= {type(one).__name__ for one in edit.maps}
        else:
            found.add(type(edit).__name__)
    return found


def measure_one(method: str, kind: str) -> tuple[float, set[str], str]:
    """The largest difference of logits to peft's, relative to the largest logit; the terms; the peft type."""
    base = FakeBase(make_base(kind))
    files, oracle = make_checkpoint(method, kind, seed=1)
    inspected = inspect(files, base, GateLimits())
    adapter = compile_adapter(inspected, base, GateLimits())
    generator = torch.Generator().manual_seed(3)
    ids, decoder_ids = (torch.randint(3, VOCAB, (1, n), generator=generator) for n in (7, 5))
    expected = oracle_logits(oracle, ids, decoder_ids)
    got = adapted_logits(base, adapter, ids, decoder_ids)
    difference = float((got - expected).abs().max() / expected.abs().max())
    return difference, terms_of(adapter), inspected.method.peft_type


def measure() -> dict[str, Any]:
    """Every method id on every kind that peft supports it on."""
    measured: dict[str, Any] = {}
    for kind in KINDS:
        for method in methods_for(kind):
            if (kind, method) in NO_FORWARD:
                continue
            difference, terms, peft_type = measure_one(method, kind)
            entry = measured.setdefault(method, {"peft_type": peft_type, "terms": [], "difference": {}})
            entry["terms"] = sorted(terms.union(entry["terms"]))
            entry["difference"][kind] = float(f"{max(difference, SMALLEST):.0e}")
            print(f"{method} on {kind}: {difference:.1e} {sorted(terms)}", file=sys.stderr)
    return dict(sorted(measured.items()))


def table(measured: Mapping[str, Any]) -> str:
    """The rows, one for each peft type."""
    lines = [
        "| peft type | tried as | becomes | largest difference to peft | multiply-adds per token | numbers held |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for peft_type in sorted(METHODS):
        entries = {name: e for name, e in measured.items() if e["peft_type"] == peft_type}
        terms = [TERMS[t] for t in TERMS if any(t in e["terms"] for e in entries.values())]
        worst = max((d for e in entries.values() for d in e["difference"].values()), default=None)
        cells = (
            f"`{peft_type}`",
            ", ".join(f"`{name}`" for name in sorted(entries)),
            "; ".join(term.words for term in terms),
            "" if worst is None else (f"below {SMALLEST:.0e}" if worst <= SMALLEST else f"{worst:.0e}"),
            "; ".join(term.work for term in terms),
            "; ".join(term.held for term in terms),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str, measured: Mapping[str, Any]) -> str:
    """The page with the table renewed."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table(measured)}\n\n{END}{after}"


def main(act: str) -> None:
    """`measure` or `write`."""
    if act == "measure":
        MEASURED.write_text(json.dumps(measure(), indent=1) + "\n")
    elif act == "write":
        PAGE.write_text(with_table(PAGE.read_text(), json.loads(MEASURED.read_text())))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
