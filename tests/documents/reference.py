"""The pages of docs/reference that are made from the code: routes, options and metrics.

    python -m tests.documents.reference write    renew docs/reference/{routes,options,metrics}.md

Routes come from the OpenAPI document of an application over fakes, options from `Settings` and from the `Layout` of
`serve-ray`, metrics from the registry.
A test holds the pages to what is made here. (The table of methods is made by `tests.documents.formats_table`.)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from transformers import AutoTokenizer

from peft_serve.api.app import create_app
from peft_serve.cluster.figures import PlacingFigures
from peft_serve.cluster.plan import Layout
from peft_serve.commands.layout import ADDRESS
from peft_serve.commands.options import VLLM_NAMES, flag
from peft_serve.config import GIB, MIB, Settings
from peft_serve.metrics import Metrics
from tests.api.api_fakes import make_world

REPOSITORY: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = REPOSITORY / "docs" / "reference"
TOKENIZER: Final = REPOSITORY / "server" / "peft_serve" / "demo" / "demo-llama"
MADE: Final = "<!-- made by: python -m tests.documents.reference write -->"

TAGS: Final[Mapping[str, str]] = {
    "generate": "Generating, native and for the clients of TGI and LoRAX",
    "openai": "For the clients of OpenAI and vLLM",
    "classify": "Classifying",
    "embed": "Embedding",
    "adapters": "Adapters",
    "operations": "Operations",
}
KIB: Final = 1 << 10
NO_BODIES: Final = frozenset({"HTTPValidationError", "ValidationError"})  # FastAPI's own; refusals here are `Problem`s
BOUNDS: Final[Mapping[str, str]] = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "{} or more characters",
    "minItems": "{} or more",
    "maxItems": "{} at most",
    "maxProperties": "{} at most",
}
SAYS_NOTHING: Final = frozenset({2**31 - 1, 2**63 - 1})
"""Upper bounds that are those of the number's type."""


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document as a server gives it."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(AutoTokenizer.from_pretrained(TOKENIZER), Path(folder))
        return create_app(world.parts).openapi()


def cell(text: object) -> str:
    """Text that ends no cell of a table."""
    return " ".join(str(text).replace("|", "\\|").split())


def row(*cells: object) -> str:
    return "| " + " | ".join(cell(each) for each in cells) + " |"


def kind_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            kinds = [kind_of(each) for each in schema[word] if each.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(each for each in kind if each != "null")
    if kind == "array":
        items = kind_of(schema.get("items", {}))
        return f"list of ({items})" if " or " in items else f"list of {items}"
    return str(kind)


def bounds_of(schema: Mapping[str, Any]) -> list[str]:
    """The ranges that a schema, or one of its alternatives, sets."""
    found = [
        words.format(schema[key]) for key, words in BOUNDS.items() if key in schema and schema[key] not in SAYS_NOTHING
    ]
    for word in ("anyOf", "oneOf"):
        for each in schema.get(word, ()):
            found += [bound for bound in bounds_of(each) if bound not in found]
    return found


def sent_with(operation: Mapping[str, Any]) -> str:
    """The query's fields, and the headers, that a route knows."""
    known = [each for each in operation.get("parameters", ()) if each["in"] != "path"]
    return ", ".join(f"`{'?' if each['in'] == 'query' else ''}{each['name']}`" for each in known)


def body_of(operation: Mapping[str, Any]) -> str:
    """What a route's body is."""
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema")
    said = [f"`{media}`" for media in content if media != "application/json"]
    if schema is None:
        return ", ".join(said)
    if "$ref" in schema:
        return kind_of(schema)
    fields = ", ".join(f"`{name}`" for name in schema.get("properties", ()))
    return ", or ".join([f"JSON with {fields}" if fields else "JSON", *said])


def route_rows(document: Mapping[str, Any], tag: str) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            if tag in operation["tags"]:
                refusals = ", ".join(sorted(status for status in operation["responses"] if status >= "400"))
                name = f"`{verb.upper()} {path}`"
                yield row(name, operation["summary"], sent_with(operation), body_of(operation), refusals)


def schema_page(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    yield ""
    if words := schema.get("description"):
        yield " ".join(words.split())
        yield ""
    if "properties" not in schema:
        yield kind_of(schema)
        yield ""
        return
    needed = schema.get("required", ())
    yield row("field", "type", "range", "meaning")
    yield row("---", "---", "---", "---")
    for field, each in schema["properties"].items():
        title = f"`{field}`" + (" (required)" if field in needed else "")
        yield row(title, kind_of(each), ", ".join(bounds_of(each)), each.get("description", ""))
    yield ""


def routes_page() -> str:
    """docs/reference/routes.md."""
    document = openapi_document()
    lines = [
        MADE,
        "# Routes",
        "",
        "Every route of a server, from its OpenAPI document; a running server gives it as `/openapi.json` and shows",
        "it at `/docs`. What the fields mean together is in [http-api.md](../http-api.md). Where `?adapter` is known,",
        "the header `X-Adapter` is too. Besides these, `GET /ui/` is the playground.",
        "",
    ]
    for tag, title in TAGS.items():
        lines += [f"## {title}", "", row("route", "does", "query and headers", "body", "refusals")]
        lines += [row(*["---"] * 5), *route_rows(document, tag), ""]
    lines += ["## Bodies", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        if name not in NO_BODIES:
            lines += schema_page(name, schema)
    return "\n".join(lines).rstrip() + "\n"


def amount(name: str, value: object) -> str:
    """A default in the words of the table."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if name.endswith("_bytes") and isinstance(value, int):
        for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
            if value % size == 0:
                return f"{value // size} {unit}"
    return f"`{value}`"


def type_of_setting(field: FieldInfo) -> str:
    """A setting's type, as pydantic's schema of it says."""
    kind = kind_of(TypeAdapter(field.annotation).json_schema())
    return {"boolean": "switch", "list of string": "text, several times", "string": "text"}.get(kind, kind)


def options_page() -> str:
    """docs/reference/options.md."""
    lines = [
        MADE,
        "# Options",
        "",
        "Every setting of `peft-serve serve`, in the order of the code. `--max-rank 64` is also",
        "`PEFT_SERVE_MAX_RANK=64`, and the line `max_rank: 64` of a YAML file ([which one",
        "counts](../command-line.md#serve)); MODEL is `PEFT_SERVE_MODEL` and `model`. A switch has a form with",
        "`--no-`. [operations.md](../operations.md#settings) says more about each.",
        "",
        row("option", "vLLM's name", "type", "default", "range", "meaning"),
        row(*["---"] * 6),
    ]
    schema = Settings.model_json_schema()["properties"]
    for name, field in Settings.model_fields.items():
        option = "MODEL" if name == "model" else f"`{flag(name)}`"
        theirs = f"`{flag(VLLM_NAMES[name])}`" if name in VLLM_NAMES else ""
        default = "none" if field.default_factory is not None else amount(name, field.default)
        bounds = ", ".join(bounds_of(schema[name]))
        lines.append(row(option, theirs, type_of_setting(field), default, bounds, field.description or ""))
    return "\n".join([*lines, "", *layout_lines()]) + "\n"


def layout_lines() -> list[str]:
    """What `serve-ray` has beyond them."""
    lines = [
        "## serve-ray",
        "",
        "`peft-serve serve-ray` has these too, on the command line alone; in the `args` of a file for Ray Serve they",
        "stand by their names with underscores. [many-replicas.md](../how-to/many-replicas.md) says when to use which.",
        "",
        row("option", "type", "default", "range", "meaning"),
        row(*["---"] * 5),
    ]
    schema = Layout.model_json_schema()["properties"]
    for name, field in Layout.model_fields.items():
        bounds = ", ".join(bounds_of(schema[name]))
        default = amount(name, field.default)
        lines.append(row(f"`{flag(name)}`", type_of_setting(field), default, bounds, field.description or ""))
    return [*lines, row(f"`{flag(ADDRESS.name)}`", "text", "none", "", ADDRESS.default.help)]


def metrics_page() -> str:
    """docs/reference/metrics.md."""
    registry = CollectorRegistry()
    Metrics(registry)
    PlacingFigures(registry)
    labels = {
        name: collector._labelnames
        for collector, names in registry._collector_to_names.items()
        for name in names
        if hasattr(collector, "_labelnames")
    }
    lines = [
        MADE,
        "# Metrics",
        "",
        "Every series of `GET /metrics`, which is Prometheus text (0.0.4), from the registry of the server. A",
        "histogram has `_bucket`, `_sum` and `_count`. Beside them stand those of the process (`process_*`, on Linux).",
        "[operations.md](../operations.md#health-and-metrics) says what each is good for. `peft_serve_replicas` and",
        "`peft_serve_placed_requests_total` are those of `serve-ray` alone.",
        "",
        row("metric", "type", "labels", "meaning"),
        row(*["---"] * 4),
    ]
    for family in registry.collect():
        if not family.name.startswith("process_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            own = getattr(family, "_labelnames", ())
            names = ", ".join(f"`{label}`" for label in labels.get(family.name, own))
            lines.append(row(f"`{name}`", family.type, names, family.documentation))
    return "\n".join(lines) + "\n"


PAGES: Final = {"routes.md": routes_page, "options.md": options_page, "metrics.md": metrics_page}


def main(act: str) -> None:
    """`write`."""
    if act != "write":
        raise SystemExit(__doc__)
    FOLDER.mkdir(exist_ok=True)
    for name, made in PAGES.items():
        (FOLDER / name).write_text(made())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
