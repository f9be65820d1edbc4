"""Where each setting's value comes from: flag, else environment, else YAML file, else default.

Owns the reading of the file and the search for typos. A name that is no setting's is refused, in the file and in the
environment alike, with the nearest one that is: a typo that counts for nothing is found on a bad day.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError
from pydantic_settings import SettingsError

from peft_serve.commands.options import PREFIX, VLLM_NAMES, flag, setting_named
from peft_serve.config import Settings

CONFIG_VARIABLE: Final = "PEFT_SERVE_CONFIG"
URL_VARIABLE: Final = "PEFT_SERVE_URL"
_NO_SETTINGS: Final = frozenset({CONFIG_VARIABLE, URL_VARIABLE})
_OF_KUBERNETES: Final = re.compile(r"PEFT_SERVE_(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")
"""What Kubernetes puts into the environment of every pod beside a service that is called `peft-serve`."""
_MAX_FILE_BYTES: Final = 1 << 20


class Source(StrEnum):
    """Where a value was said, the strongest first."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


class ConfigurationInvalid(ValueError):  # noqa: N818  named as a refusal, like those of `errors`
    """The settings contradict a rule; one line for each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One setting: its value and the place that said it."""

    name: str
    value: Any
    source: Source
    place: str  # the flag, the variable or the file; empty for a default


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Every setting of a server, and where each was said."""

    settings: Settings
    origins: tuple[Origin, ...]


def configured(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Configuration:
    """The settings that flags, the process' environment (`environ`) and the file amount to.

    A flag counts when it is neither None nor an empty list. Without `file`, the variable PEFT_SERVE_CONFIG may name
    one. Raises ConfigurationInvalid.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    if file is None and environ.get(CONFIG_VARIABLE):
        file = Path(environ[CONFIG_VARIABLE])
    written = {} if file is None else read_file(file)
    variables = _variables(environ)
    below = {name: value for name, value in written.items() if name not in given and name not in variables}
    places = {name: (Source.FILE, str(file)) for name in below}
    places |= {name: (Source.ENVIRONMENT, variable) for name, variable in variables.items()}
    places |= {name: (Source.FLAG, "MODEL" if name == "model" else flag(name)) for name in given}
    try:
        settings = Settings(**{**below, **given})
    except ValidationError as error:
        raise ConfigurationInvalid([_told(problem, places) for problem in error.errors()]) from None
    except SettingsError as error:  # of a list in the environment that is not JSON; its words name the field
        named = [variable for name, variable in variables.items() if f'"{name}"' in str(error)]
        raise ConfigurationInvalid(
            [f"{named[0] if named else 'environment'}: a list is written as JSON, such as '[\"folder\"]'"]
        ) from None
    origins = (
        Origin(name=name, value=getattr(settings, name), source=source, place=place)
        for name in Settings.model_fields
        for source, place in [places.get(name, (Source.DEFAULT, ""))]
    )
    return Configuration(settings=settings, origins=tuple(origins))


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by their own names; those without a value are left out."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationInvalid([f"{path}: cannot be read ({error.strerror}); check the path"]) from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigurationInvalid([f"{path}: has more than {_MAX_FILE_BYTES} bytes; a configuration is short"])
    try:
        parsed = yaml.load(content, Loader=_Strict)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationInvalid([f"{path}: is not YAML: {' '.join(str(error).split())}"]) from None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise ConfigurationInvalid([f"{path}: should hold lines such as 'max_rank: 64'"])
    return dict(_named(parsed, path))


def _named(parsed: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    seen: dict[str, str] = {}
    unknown = []
    for word, value in parsed.items():
        name = setting_named(str(word))
        if name not in Settings.model_fields:
            unknown.append(f"{path}: {word}: is no setting; {nearest(str(word))}")
        elif name in seen:
            unknown.append(f"{path}: {word}: says the same as {seen[name]}; keep one of them")
        elif value is not None:
            seen[name] = str(word)
            yield name, value
    if unknown:
        raise ConfigurationInvalid(unknown)


def nearest(word: str, spelt: Callable[[str], str] = str) -> str:
    """The advice for a name that is no setting's. `spelt` writes a name as it is written in that place."""
    known = [*Settings.model_fields, *VLLM_NAMES.values()]
    close = difflib.get_close_matches(word.lower().replace("-", "_"), known, n=1, cutoff=0.6)
    return f"did you mean {spelt(close[0])}?" if close else "peft-serve config show lists them"


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that say a setting, by the setting's name."""
    found, unknown = {}, []
    for variable, value in environ.items():
        upper = variable.upper()
        name = upper.removeprefix(PREFIX).lower()
        if not upper.startswith(PREFIX) or upper in _NO_SETTINGS or _OF_KUBERNETES.fullmatch(upper):
            continue
        if name == "port" and value.startswith("tcp://"):
            unknown.append(
                f"{variable}={value}: was put there by Kubernetes for a service called peft-serve; set "
                "enableServiceLinks: false in the pod's spec"
            )
        elif name in Settings.model_fields:
            found[name] = variable
        else:
            unknown.append(f"{variable}: is no setting; {nearest(name, _variable)}")
    if unknown:
        raise ConfigurationInvalid(unknown)
    return found


def _variable(word: str) -> str:
    return PREFIX + setting_named(word).upper()


def _told(problem: Any, places: Mapping[str, tuple[Source, str]]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    source, place = places.get(name, (Source.DEFAULT, ""))
    where = f"{place}: {name}" if source is Source.FILE else place or flag(name)
    given = "" if name == "api_key" else f" (given: {problem.get('input')!r})"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{given}"


class _Strict(yaml.SafeLoader):
    """YAML 1.2's booleans (true and false: `on` is a word, and a value of --prepack), and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own table, narrowed
        first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:bool"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Strict.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
