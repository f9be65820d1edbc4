"""Patterns, targets and layer numbers: what is read literally agrees with what peft reads as patterns."""

from __future__ import annotations

import re

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peft_serve.adapters.config_schema import LITERAL, Config
from peft_serve.adapters.targets import is_named, is_saved, named_sites, tie_partners
from tests.attacks.hostile import base_of

WORDS = st.sampled_from(["model", "layers", "0", "1", "q_proj", "v_proj", "mlp", "self_attn"])
PATHS = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
KEYS = st.builds(
    lambda key, begin, end: begin + key + end, PATHS, st.sampled_from(["", "^"]), st.sampled_from(["", "$"])
)


@given(path=PATHS, keys=st.lists(KEYS, max_size=5, unique=True))
def test_patterns_choose_the_key_that_peft_chooses(path: str, keys: list[str]) -> None:
    """Except for `^` behind a prefix, which matches nothing in either reading."""
    assert all(LITERAL.fullmatch(key) for key in keys)
    chosen = get_pattern_key(keys, path)
    values = {key: i for i, key in enumerate(keys)}
    assert Config({"rank_pattern": values}).for_site("rank_pattern", path) == values.get(chosen)


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a..b", "a*", "(a)", "a|b", "[ab]", "a b", "a\n", "\\d", "^^a"])
def test_anything_else_is_no_literal(key: str) -> None:
    assert not LITERAL.fullmatch(key)


@given(
    target_modules=st.lists(PATHS, min_size=1, max_size=3),
    exclude_modules=st.none() | st.lists(PATHS, max_size=2),
    layers_to_transform=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2),
    layers_pattern=st.none() | st.just("layers") | st.just(["layers", "h"]),
    modules_to_save=st.none() | st.lists(st.sampled_from(["norm", "mlp", "lm_head"]), max_size=2),
)
def test_named_sites_are_those_that_peft_targets(**fields: object) -> None:
    base = base_of("llama")
    if not fields["layers_to_transform"] and fields["layers_to_transform"] != 0:
        fields["layers_pattern"] = None  # peft refuses a pattern without numbers
    oracle = peft.LoraConfig()
    for name, value in fields.items():
        setattr(oracle, name, value)
    expected = {path for path in base.sites if bool(check_target_module_exists(oracle, path))}
    assert named_sites(Config(fields), base) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "exclude_modules": ".*v.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(a+)+"},
    ],
)
def test_what_takes_a_pattern_is_left_to_the_keys(fields: dict[str, object]) -> None:
    assert named_sites(Config(fields), base_of("llama")) is None


@given(path=PATHS, names=st.lists(PATHS, max_size=4))
def test_is_named_is_a_dotted_suffix(path: str, names: list[str]) -> None:
    expected = any(path == name or path.endswith(f".{name}") for name in names)
    assert is_named(path, frozenset(names)) == expected


@given(path=PATHS, saved=st.lists(st.sampled_from(["proj", "mlp", "q_proj", "0"]), max_size=3))
def test_saved_modules_cover_what_lies_in_them(path: str, saved: list[str]) -> None:
    parts = path.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    assert is_saved(path, saved) == any(re.search(f"{s}$", p) for s in saved for p in prefixes)


def test_tie_partners() -> None:
    assert tie_partners(base_of("llama_tied"), "lm_head") == {"model.embed_tokens"}
    assert tie_partners(base_of("llama"), "lm_head") == frozenset()
