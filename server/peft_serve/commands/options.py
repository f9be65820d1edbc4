"""The options of `serve`: one for each field of `Settings`, under our name and under vLLM's where vLLM has one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Optional

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.markup import escape

from peft_serve.config import Settings

PREFIX: Final = "PEFT_SERVE_"
"""Of the environment variable of every setting."""

VLLM_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "quantisation": "quantization",
        "kv_cache_bytes": "kv_cache_memory_bytes",
        "log_level": "uvicorn_log_level",
        "max_rank": "max_lora_rank",
        "max_rows": "max_num_seqs",
        "max_step_adapters": "max_loras",
        "max_step_tokens": "max_num_batched_tokens",
        "max_top_logprobs": "max_logprobs",
    }
)
"""Settings that vLLM has under another name. Those of one name (`--max-model-len`, `--block-size`, ..) are not here."""


def flag(name: str) -> str:
    """The option of a setting, or of its other name."""
    return f"--{name.replace('_', '-')}"


def setting_named(word: str) -> str:
    """The setting meant by a word of a command line or a file: dashes or underscores, our name or vLLM's."""
    name = word.replace("-", "_")
    return next((ours for ours, theirs in VLLM_NAMES.items() if theirs == name), name)


def _as_option(name: str, field: FieldInfo, told_here: str | None) -> inspect.Parameter:
    """The command-line option of a settings field; None when it is not given, so that the environment counts.
    `told_here` stands in the help instead of the field's own words."""
    flags = [flag(name)]
    if name in VLLM_NAMES:
        flags.append(flag(VLLM_NAMES[name]))
    default = None if field.default is PydanticUndefined else field.default
    told = [] if default in (None, []) else [f"default: {default}"]
    told.append(f"env: {PREFIX}{name.upper()}")
    text = escape(
        f"{told_here or field.description or ''} [{'; '.join(told)}]".strip()
    )  # brackets are markup in a help page
    annotation: Any = field.annotation
    if field.annotation == SecretStr | None:
        annotation = str | None  # Settings hides it again
    if annotation is bool:
        flags = [f"{each}/--no-{each.removeprefix('--')}" for each in flags]
    if "list" not in str(annotation) and "None" not in str(annotation):
        annotation = Optional[annotation]  # noqa: UP045  # made at run time, where `X | None` of a Literal is the same
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=typer.Option(None, *flags, help=text), annotation=annotation
    )


def with_settings(
    run: Callable[..., None],
    *,
    extra: tuple[inspect.Parameter, ...] = (),
    told: Mapping[str, str] = MappingProxyType({}),
) -> Callable[..., None]:
    """`run` as a command with the argument MODEL and an option for each setting, besides those in `extra`. `told` has
    the words for settings that are not the same in this command."""

    def command(**values: Any) -> None:
        run(**values)

    command.__doc__ = escape(run.__doc__ or "")
    model = inspect.Parameter(
        "model",
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Argument(
            None, help="demo-llama (the default), demo-t5, a folder, or a hub id", show_default=False
        ),
        annotation=Optional[str],  # noqa: UP045  # as above
    )
    options = [
        _as_option(name, field, told.get(name)) for name, field in Settings.model_fields.items() if name != "model"
    ]
    parameters = [model, *extra, *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
