"""The recipe for nginx: which requests it sends where, and that it agrees with the server behind it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from peft_serve.api.route_needs import ENTRIES, Need
from peft_serve.config import Settings
from tests.conftest import REPOSITORY
from tests.deploy.ring import Ring

CONF = REPOSITORY / "deploy" / "nginx" / "peft-serve.conf"
TOKEN = re.compile(r'"[^"]*"|[{};]|[^\s{};"]+')
Block = list[tuple[list[str], "Block | None"]]


def parsed(text: str) -> Block:
    """Directives with their words, and what stands in their braces."""
    words: list[str] = []
    stack: list[Block] = [[]]
    for token in TOKEN.findall(re.sub(r"(^|\s)#.*", "", text)):
        if token in ("{", ";"):
            stack[-1].append((words, [] if token == "{" else None))
            if token == "{":
                inside = stack[-1][-1][1]
                assert inside is not None
                stack.append(inside)
            words = []
        elif token == "}":
            assert not words, f"a semicolon is missing after {words}"
            stack.pop()
        else:
            words.append(token.strip('"'))
    assert len(stack) == 1, "braces match"
    assert not words, f"a semicolon is missing after {words}"
    return stack[0]


def of(block: Block, *head: str) -> Block:
    """What stands in the braces of the one directive that begins so."""
    (found,) = (inside for words, inside in block if inside is not None and words[: len(head)] == list(head))
    return found


def words_of(block: Block, name: str) -> list[str]:
    (found,) = (words[1:] for words, _ in block if words[0] == name)
    return found


@pytest.fixture(scope="module")
def conf() -> Block:
    return parsed(CONF.read_text())


def mapped(conf: Block, source: str, value: str, variables: dict[str, str]) -> str:
    """nginx's map: the very value first, then the expressions in their order, then the default."""
    rules = [words for words, _ in of(conf, "map", source)]
    plain = {words[0]: words[1] for words in rules if len(words) == 2 and not words[0].startswith("~")}
    chosen = plain.get(value)
    for words in rules:
        if chosen is None and words[0].startswith("~"):
            found = re.search(words[0][1:].replace("(?<", "(?P<"), value)
            if found:
                variables |= {f"${name}": text for name, text in found.groupdict().items()}
                chosen = words[1]
    chosen = plain["default"] if chosen is None else chosen
    return variables[chosen] if chosen.startswith("$") else chosen


def key_of(conf: Block, adapter: str = "", header: str = "") -> str:
    variables = {"$arg_adapter": adapter, "$http_x_adapter": header, "$request_id": "some random id"}
    named = mapped(conf, "$arg_adapter", adapter, variables)
    return mapped(conf, "$peft_serve_named", named, variables | {"$peft_serve_named": named})


def test_a_request_goes_by_its_adapter(conf: Block) -> None:
    assert key_of(conf, adapter="a") == "a"
    assert key_of(conf, header="b") == "b"
    assert key_of(conf, adapter="a", header="b") == "a", "as the server reads it"
    assert key_of(conf) == "some random id", "the base, and an adapter that only the body names, go anywhere"
    assert [key_of(conf, adapter=name) for name in ("a@2", "a%402", "a@sha256:01")] == ["a"] * 3
    assert key_of(conf, adapter="a+b") == "a+b"
    assert key_of(conf, adapter="a%2Bb@2") == "a%2Bb@2"
    upstream = of(conf, "upstream", "peft_serve")
    assert words_of(upstream, "hash") == ["$peft_serve_key", "consistent"]


def test_a_server_that_goes_moves_its_own_adapters_only() -> None:
    servers = [f"10.0.0.{i}:8000" for i in range(1, 5)]
    names = [f"adapter-{i}" for i in range(2000)]
    whole, less = Ring(servers), Ring(servers[:-1])
    before = {name: whole.server_of(name) for name in names}
    after = {name: less.server_of(name) for name in names}
    assert all(after[name] == before[name] for name in names if before[name] != servers[-1])
    counts = Counter(before.values())
    assert set(counts) == set(servers)
    assert max(counts.values()) < 1.5 * len(names) / len(servers)


def test_posts_are_repeated_where_that_changes_nothing(conf: Block) -> None:
    server = of(conf, "server")
    ((head, _),) = [(words, inside) for words, inside in server if words[:2] == ["location", "~"]]
    pattern = re.compile(head[2])
    inference = {each.template for each in ENTRIES if each.methods == "POST" and each.need is Need.INFER}
    others = {each.template for each in ENTRIES if each.need is not Need.INFER} - {"/"}
    assert {path for path in inference if pattern.search(path)} == inference
    assert {path for path in others if pattern.search(path)} == set()
    assert words_of(of(server, "location", "~"), "proxy_next_upstream") == ["error", "http_503", "non_idempotent"]
    assert "non_idempotent" not in words_of(of(server, "location", "/"), "proxy_next_upstream")


def test_its_limits_fit_those_of_the_server(conf: Block) -> None:
    server, settings = of(conf, "server"), Settings()
    (size,) = words_of(server, "client_max_body_size")
    assert int(size.removesuffix("m")) << 20 > settings.max_adapter_bytes
    (wait,) = words_of(server, "proxy_read_timeout")
    assert int(wait.removesuffix("s")) > settings.keep_alive_s
    (idle,) = words_of(of(conf, "upstream", "peft_serve"), "keepalive_timeout")
    assert int(idle.removesuffix("s")) < 75
    assert words_of(server, "proxy_buffering") == ["off"]


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_takes_it(tmp_path: Path) -> None:
    whole = tmp_path / "nginx.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    whole.write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {paths} include {CONF}; }}"
    )
    done = subprocess.run(["nginx", "-t", "-p", tmp_path, "-c", whole], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
