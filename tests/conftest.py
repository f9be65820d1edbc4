"""What every test shares: no network, one torch thread, a tiny byte-level tokenizer."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, and torch._dynamo does

REPOSITORY = Path(__file__).resolve().parents[1]
YOUNG_OBJECTS = 50_000  # between two searches for garbage; with Python's own 700 they are some percent of the time
LONGEST = (
    *("tests/cluster/test_two_replicas.py", "tests/parity/test_parity_http.py", "tests/documents/test_pages.py"),
    "tests/api/test_api_lifecycle.py",
)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left with one of them when the others are done."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported meanwhile stays to the end: no search for garbage need look through it again and again, neither
    while it grows nor later. Later ones are rare: a tiny model is more objects than Python lets come between two."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, 20, 20)
        gc.enable()


@pytest.fixture(autouse=True)
def undisturbed_logs() -> Iterator[None]:
    """A command that sets up the process's logs leaves no handler or level to the tests after it."""
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [each for each in root.handlers if type(each).__module__.startswith("peft_serve.")]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """As `make_tiny_tokenizer` makes it."""
    return make_tiny_tokenizer()


def make_tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 261 entries: <pad> 0, </s> 1, <unk> 2, <s> 3, <sep> 4, then the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "</s>", "<unk>", "<s>", "<sep>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )
