"""`peft-serve adapters`: each command against a server, and how each refusal ends."""

from __future__ import annotations

import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from peft_serve.adapters.members import WANTED
from peft_serve.adapters.sources.opening import Sources
from peft_serve.commands import packing
from peft_serve.commands.adapters import etag
from peft_serve.commands.exits import CommandFailed
from tests.api.api_fakes import World, checkpoint, make_world, zipped
from tests.api.conftest import running, served
from tests.commands.conftest import run, write_checkpoint


def test_the_list_shows_every_adapter_and_where_it_is(url: str, world: World) -> None:
    world.engine.load(world.adapters["plain"])
    said = run("adapters", "list", "--url", url)
    assert said.code == 0
    lines = {line.split()[0]: line for line in said.out.splitlines()[1:]}
    assert set(lines) == {"plain", "complaints", "soft"}
    assert "device" in lines["plain"]
    assert "disk" in lines["soft"]
    resident = run("adapters", "list", "--url", url, "--resident", "--json").json
    assert [each["name"] for each in resident["adapters"]] == ["plain"]


def test_the_address_may_come_from_the_environment(url: str) -> None:
    said = run("adapters", "list", "--json", env={"PEFT_SERVE_URL": f"{url}/"})
    assert [each["name"] for each in said.json["adapters"]] == ["complaints", "plain", "soft"]


def test_one_adapter_is_shown_with_its_versions(url: str, world: World) -> None:
    world.publish("plain", checkpoint("another"))
    shown = run("adapters", "show", "plain", "--url", url)
    assert world.adapters["plain"] in shown.out
    assert run("adapters", "show", "plain", "--url", url, "--json").json["version"] == 2
    versions = run("adapters", "versions", "plain", "--url", url, "--json").json["versions"]
    assert [each["version"] for each in versions] == [1, 2]
    assert world.adapters["plain"] in run("adapters", "versions", "plain", "--url", url).out


def test_a_folder_is_packed_and_pushed_under_its_own_name(url: str, folder: Path, world: World) -> None:
    said = run("adapters", "push", str(folder), "--url", url)
    assert (said.code, said.err) == (0, "")
    assert "fresh is version 1: LORA of rank 8" in said.out
    again = run("adapters", "push", str(folder), "--url", url)
    assert "fresh is still version 1" in again.out
    entry = world.catalog.get("fresh")
    assert entry.version is not None
    assert world.catalog.files(entry.version.id).ignored == (), "only the checkpoint's own files travel"


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_is_pushed_as_it_is(url: str, folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"packed.{kind}"
    if kind == "zip":
        path.write_bytes(zipped(checkpoint("fresh")))
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(folder, "folder")
    said = run("adapters", "push", str(path), "other", "--url", url, "--json")
    assert (said.json["name"], said.json["version"]) == ("other", 1)
    assert run("adapters", "push", str(path), "--url", url, "--json").json["name"] == "packed"


def test_a_dry_run_and_a_validation_keep_nothing(url: str, folder: Path, world: World) -> None:
    dry = run("adapters", "push", str(folder), "--dry-run", "--url", url)
    assert "fresh would be version 1" in dry.out
    assert "would be accepted" in run("adapters", "validate", str(folder), "--url", url).out
    assert [entry.name for entry in world.catalog.list()] == ["complaints", "plain", "soft"]


def test_preconditions_guard_a_name(url: str, folder: Path, world: World) -> None:
    refused = run("adapters", "push", str(folder), "plain", "--create-only", "--url", url)
    assert refused.code == 4
    assert "precondition_failed: adapter 'plain' exists already" in refused.err
    digest = world.adapters["plain"]
    moved = run("adapters", "push", str(folder), "plain", "--if-match", digest, "--url", url)
    assert moved.code == 0
    late = run("adapters", "push", str(folder), "plain", "--if-match", digest, "--url", url)
    assert late.code == 4
    assert run("adapters", "rm", "plain", "--yes", "--if-match", digest, "--url", url).code == 4
    assert run("adapters", "push", str(folder), "--if-match", "v1", "--url", url).code == 2


def test_a_refused_upload_shows_each_place_and_reason(url: str, tmp_path: Path) -> None:
    bad = write_checkpoint(tmp_path / "bad", checkpoint("bad", bad="no [such] module"))
    said = run("adapters", "push", str(bad), "--url", url)
    assert said.code == 4
    assert "adapter_invalid:" in said.err
    assert "  q_proj.lora_A: no [such] module" in said.err, "brackets are text"
    assert "  q_proj.lora_B: has a twin" in said.err
    errors = run("adapters", "validate", str(bad), "--url", url, "--json").json["error"]
    assert (errors["status"], errors["code"]) == (422, "adapter_invalid")
    assert errors["errors"][1] == {"path": "q_proj.lora_B", "reason": "has a twin"}


def test_what_is_no_checkpoint_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    nowhere = ("--url", "http://127.0.0.1:1")  # were anything sent, the code would be 3
    empty = write_checkpoint(tmp_path / "empty", {"notes.txt": b""})
    assert "holds no adapter_config.json" in run("adapters", "push", str(empty), *nowhere).err
    write_checkpoint(tmp_path / "outer" / "inner", checkpoint())
    said = run("adapters", "push", str(tmp_path / "outer"), *nowhere)
    assert (said.code, "did you mean" in said.err) == (2, True)
    pickled = write_checkpoint(tmp_path / "old", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04"})
    assert "adapter_model.bin, a pickle" in run("adapters", "push", str(pickled), *nowhere).all
    assert "no such folder" in run("adapters", "push", str(tmp_path / "typo"), *nowhere).err
    assert "neither a folder" in run("adapters", "push", str(empty / "notes.txt"), *nowhere).err
    assert run("adapters", "push", str(pickled), *nowhere).code == 2


def test_every_file_that_a_server_reads_is_packed() -> None:
    assert set(packing._FILES) == set(WANTED)


def test_a_version_is_pulled_whole_and_can_be_pushed_again(
    url: str, folder: Path, tmp_path: Path, world: World
) -> None:
    run("adapters", "push", str(folder), "--url", url)
    world.publish("fresh", checkpoint("newer"))
    copy = tmp_path / "copy"
    said = run("adapters", "pull", "fresh@1", str(copy), "--url", url, "--json")
    assert (said.json["name"], said.json["version"], said.json["folder"]) == ("fresh", 1, str(copy))
    assert {each.name for each in copy.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (copy / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    assert run("adapters", "push", str(copy), "copied", "--url", url, "--json").json["digest"] == said.json["digest"]
    taken = run("adapters", "pull", "fresh", str(copy), "--url", url)
    assert (taken.code, "is there already" in taken.err) == (2, True)
    assert run("adapters", "pull", "nobody", "--url", url).code == 4
    assert not list(tmp_path.glob(".*")), "nothing half done is left"


def test_a_source_is_fetched_by_the_server(tiny_tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    made = make_world(tiny_tokenizer, tmp_path / "server")
    made.parts = replace(made.parts, sources=Sources((f"file:{tmp_path}",)))
    bad = write_checkpoint(tmp_path / "bad", checkpoint("bad", bad="no such module"))
    with running(made), served(made) as url:
        said = run("adapters", "push", f"file:{folder}", "--url", url)
        assert (said.code, said.err) == (0, "")
        assert "fresh is version 1" in said.out
        assert run("adapters", "push", f"file:{folder}", "other", "--url", url, "--json").json["name"] == "other"
        refused = run("adapters", "push", f"file:{bad}", "--url", url)
        assert (refused.code, "q_proj.lora_A: no such module" in refused.err) == (4, True)
        assert run("adapters", "push", f"file:{folder}", "--create-only", "--url", url).code == 4
        assert run("adapters", "push", "hf://org/repo@v1", "--url", url).code == 4, "this server does not allow it"
        assert run("adapters", "push", f"file:{folder}", "--dry-run", "--url", url).code == 2
        by_address = run("adapters", "push", "https://example.org/x.tar", "--url", url)
        assert (by_address.code, "nothing is fetched from there" in by_address.err) == (2, True)


def test_rollback_and_removal(url: str, folder: Path, world: World) -> None:
    world.publish("plain", checkpoint("another"))
    assert "plain is version 1" in run("adapters", "rollback", "plain", "--url", url).out
    assert run("adapters", "rollback", "plain", "--version", "2", "--url", url, "--json").json["version"] == 2
    assert run("adapters", "rollback", "soft", "--url", url).code == 4
    unasked = run("adapters", "rm", "plain", "--json", "--url", url)
    assert (unasked.code, "--yes" in unasked.json["error"]["message"]) == (2, True)
    kept = run("adapters", "rm", "plain", "--url", url, stdin="n\n")
    assert (kept.code, world.catalog.get("plain").name) == (1, "plain")
    assert "plain is deleted" in run("adapters", "rm", "plain", "--url", url, stdin="y\n").out
    assert run("adapters", "rm", "plain", "--yes", "--url", url).code == 4


@pytest.mark.parametrize("act", ["pin", "unpin", "load", "unload"])
def test_adapters_are_moved(url: str, world: World, act: str) -> None:
    said = run("adapters", act, "plain", "--url", url, "--json")
    assert (said.code, said.json["name"]) == (0, "plain")
    assert (act, world.adapters["plain"]) in world.engine.commands
    assert run("adapters", act, "nobody", "--url", url).code == 4


def test_a_server_that_is_not_there_has_a_code_of_its_own() -> None:
    said = run("adapters", "list", "--url", "http://127.0.0.1:1")
    assert said.code == 3
    assert "peft-serve serve" in said.err
    assert run("adapters", "list", "--url", "http://127.0.0.1:1", "--json").json["error"]["code"] == "unreachable"
    assert run("adapters", "list", "--url", "localhost:8000").code == 2


def test_something_else_at_the_address_is_told() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: object) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        said = run("adapters", "list", "--url", f"http://127.0.0.1:{server.server_port}")
    assert said.code == 1
    assert "not in JSON" in said.err


def test_a_version_is_named_by_digest_or_tag() -> None:
    digest = "ab" * 32
    assert etag(f"sha256:{digest}") == etag(f'"sha256-{digest}"') == etag(f"sha256-{digest}") == f'"sha256-{digest}"'
    assert etag("*") == "*"
    with pytest.raises(CommandFailed, match="is no digest"):
        etag("latest")


def test_verify_keeps_its_own_options() -> None:
    said = run("adapters", "verify", "--help")
    assert said.code == 0
    assert "--task-id" in said.out
