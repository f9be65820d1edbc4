"""How sources are spelled, and which of them an operator's patterns allow."""

from __future__ import annotations

import pytest

from peft_serve.adapters.sources.allowing import AllowedSources
from peft_serve.adapters.sources.locator import Kind, parse_locator
from peft_serve.errors import InvalidParameter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("file:/srv/adapters/one", "file:/srv/adapters/one"),
        ("file:///srv/adapters/one/", "file:/srv/adapters/one"),
        ("hf://org/repo", "hf://org/repo"),
        ("hf://org/repo/", "hf://org/repo"),
        (f"hf://org/repo@{COMMIT}/a/b", f"hf://org/repo@{COMMIT}/a/b"),
        ("hf://org/repo@refs/pr/3", "hf://org/repo@refs%2Fpr%2F3"),
        ("hf://org/repo@refs%2Fpr%2F3/sub", "hf://org/repo@refs%2Fpr%2F3/sub"),
        ("hf://org/repo@feature%2Fone", "hf://org/repo@feature%2Fone"),
        ("s3://bucket/team/one", "s3://bucket/team/one"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/a b/", "az://container/a b"),
    ],
)
def test_a_source_is_read_and_spelled_again(text: str, spelled: str) -> None:
    locator = parse_locator(text)
    assert str(locator) == spelled
    assert parse_locator(spelled) == locator


def test_what_the_parts_of_a_hub_source_are() -> None:
    locator = parse_locator("hf://org/repo@v1/sub/folder")
    assert (locator.kind, locator.repo, locator.revision) == (Kind.HF, "org/repo", "v1")
    assert locator.steps == ("org", "repo", "sub", "folder")


@pytest.mark.parametrize(
    "text",
    [
        "", "org/repo", "http://host/x", "https://huggingface.co/org/repo", "ftp://host/x", "FILE:/x", "s3a://b/x",
        "file:relative", "file:/", "file:/a/../b", "file:/a/./b", "file:/a//b", "file://host/a", "file:/a\x00b",
        "file:/a\\b", "hf://repo", "hf:org/repo", "hf://org/repo@", "hf://org/../repo", "hf://org/repo@../x",
        "hf://org/repo@-x", "hf://org/repo/../other", "hf://-org/repo", "hf://user:pw@host/repo", "hf://org/re po",
        "hf://org/repo@a%2F..%2Fb", "hf://org/repo@refs/heads/x", "s3:/bucket/x", "s3://", "s3://UP/x", "s3://b/../x",
        "s3://bucket//x", "s3://169.254.169.254:80/x", "s3://user@host/x", "gs://b\n/x", "hf://o/" + "r" * 2000,
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^source ") as refused:
        parse_locator(text)
    assert len(refused.value.message) < 250
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("hf://org/*", ["hf://org/a", "hf://org/b@v1/sub"], ["hf://other/a", "hf://orgs/a", "s3://org/a"]),
        ("hf://org", ["hf://org/a"], ["hf://orga/a"]),
        ("hf://*", ["hf://org/a"], ["s3://bucket/x", "file:/x"]),
        ("hf://org/lora-*", ["hf://org/lora-1"], ["hf://org/other"]),
        ("hf://org/repo@v*", ["hf://org/repo@v1"], ["hf://org/repo", "hf://org/repo@main"]),
        ("hf://org/repo@refs%2Fpr%2F1", ["hf://org/repo@refs/pr/1"], ["hf://org/repo@refs/pr/2"]),
        ("s3://bucket/t-*", ["s3://bucket/t-a", "s3://bucket/t-a/x"], ["s3://bucket/x", "s3://bucket", "gs://bucket/t-a"]),
        ("az://con/a/", ["az://con/a/b"], ["az://con/ab"]),
        ("file:/srv/adapters", ["file:/srv/adapters", "file:/srv/adapters/one"], ["file:/srv", "file:/srv/adapters2"]),
        ("file:/srv/a*", ["file:/srv/a*/x"], ["file:/srv/ab/x"]),
    ],
)  # fmt: skip
def test_what_a_pattern_allows(pattern: str, allowed: list[str], refused: list[str]) -> None:
    patterns = AllowedSources([pattern])
    assert all(patterns.allows(parse_locator(text)) for text in allowed)
    assert not any(patterns.allows(parse_locator(text)) for text in refused)


def test_nothing_is_allowed_without_a_pattern() -> None:
    assert not AllowedSources().kinds
    assert not AllowedSources().allows(parse_locator("file:/srv/adapters"))


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "http://host/*", "hf://", "hf:org/*", "hf://org/**", "s3://b/../c", "file:relative", "file:/", "hf://o/r@v/x",
     "hf://o/r@"],
)  # fmt: skip
def test_a_bad_pattern_stops_the_start(pattern: str) -> None:
    with pytest.raises(ValueError, match="--allow-source"):
        AllowedSources([pattern])
