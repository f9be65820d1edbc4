"""What does not fit is refused in words: numbers, names, addresses and files; and what is filed is JSON, each run's
in a folder of its own."""

from __future__ import annotations

import json
import socket
from datetime import datetime
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest

from loadtest.cli import main
from loadtest.filing import new_folder
from loadtest.machine import Provenance
from loadtest.measure import summarise
from loadtest.plots import Plot
from loadtest.report import Report, load_report
from loadtest.trace import Trace
from loadtest.workloads import replay


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("w4 --duration 0", "--duration: 0 does not do here; write a number above zero"),
        ("w4 --duration -3", "above zero"),
        ("w4 --duration nan", "above zero"),
        ("w4 --duration long", "'long' is no number"),
        ("w1 --adapters -1", "--adapters: -1 is too small; write a whole number from 0 on"),
        ("w4 --adapters 0", "from 1 on"),
        ("w4 --adapters some", "'some' is no whole number"),
        ("w4 --concurrency 0", "from 1 on"),
        ("w4 --threads 0", "from 1 on"),
        ("w4 --seed -1", "from 0 on"),
        ("w5 --requests 0", "from 1 on"),
        ("w5 --batch-size 0", "from 1 on"),
        ("w5 --window -1", "from 0 on"),
        ("overhead --repeats 0", "from 1 on"),
        ("w13 --tokens 0", "from 1 on"),
        ("ceiling --streams 0", "from 1 on"),
        ("ceiling --steps 0", "above zero"),
        ("ceiling --rows 0", "from 1 on"),
        ("bench --threads 0", "from 1 on"),
        ("compare t.json --peer native --batch-size 0", "from 1 on"),
        ("trace t.json --rate 0", "above zero"),
        ("trace t.json --cv -1", "above zero"),
        ("trace t.json --popularity slora:0", "popularity 'slora:0': it takes a number above zero"),
        ("trace t.json --popularity drift:0", "above zero"),
        ("trace t.json --popularity skewed:inf", "above zero"),
        ("trace t.json --popularity zipf:-1", "from zero on"),
        ("trace t.json --popularity zipf:much", "'much' is no number"),
        ("trace t.json --popularity distinct:2", "takes no number; write distinct"),
        ("trace t.json --popularity pareto", "'pareto' is not known"),
        ("w4 --lengths foo", "lengths 'foo': write cpu, gpu or PMIN-PMAX,AMIN-AMAX"),
        ("w4 --lengths 5-3,1-1", "ascending ranges"),
        ("w4 --url localhost:9999", "write http://localhost:9999"),
        ("w4 --url http://", "is no address"),
        ("w4 --url http://host:port", "is no address"),
        ("w4 --url http://host:80/v1", "write http://host:80"),
        ("cache-replay t.jsonl --duration 5", "unrecognized arguments: --duration 5"),
    ],
)
def test_what_does_not_fit_an_option_is_refused_in_words(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_step_that_does_not_exist_is_refused_beside_one_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--only", "w4", "--only", "w99", "--out", str(tmp_path / "out")]) == 1
    assert "--only w99 names no step; there are bound, w1" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mixture", ["lora:0", "prompt:few", "prefix:-1"])
def test_sizes_of_a_mixture_are_refused_in_words(
    mixture: str, tiny_work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--base", "tiny", "--work", str(tiny_work), "--adapters", "1"]
    assert main(["make-adapters", "--mixture", mixture, *common]) == 1
    assert "is no size; write a whole number from 1 on" in capsys.readouterr().out


REQUEST: dict[str, Any] = {
    "index": 0,
    "arrival_s": 0.5,
    "adapter": "",
    "text": "a",
    "prompt_tokens": 1,
    "max_new_tokens": 2,
}


def holding(*requests: Any) -> bytes:
    return json.dumps({"requests": requests}).encode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"  \n", "the file is empty"),
        (b"no json", "not JSON from line 1, column 1 on"),
        (b'{"requests": [', "not JSON from line 1"),
        (b'{"requests": "\xff"}', "byte 14 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "JSON, but no object"),
        (b"{}", "no list of requests"),
        (b'{"requests": {}}', "no list of requests"),
        (holding(3), "requests[0] is no object"),
        (holding({}), "requests[0] lacks "),
        (holding(REQUEST, {name: REQUEST[name] for name in REQUEST if name != "text"}), "requests[1] lacks 'text'"),
        (holding({**REQUEST, "model": "m"}), "requests[0] has an unknown field, 'model'"),
        (holding({**REQUEST, "text": 3}), "requests[0]: text is 3, not a text"),
        (holding({**REQUEST, "max_new_tokens": 2.5}), "max_new_tokens is 2.5, not a whole number"),
        (holding({**REQUEST, "index": True}), "index is True, not a whole number"),
        (holding({**REQUEST, "arrival_s": "now"}), "arrival_s is 'now', not a number of seconds"),
        (holding({**REQUEST, "arrival_s": -1}), "arrival_s is -1, which is not possible"),
        (holding({**REQUEST, "arrival_s": nan}), "arrival_s is nan, which is not possible"),
        (holding({**REQUEST, "prompt_tokens": 10**400}), "which is not possible"),
        (holding(REQUEST, REQUEST), "two requests have one index"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_in_words(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a trace") as refused:
        Trace.load(path)
    said = str(refused.value)
    assert said.startswith(f"{path} is not a trace (")
    assert why in said
    assert said.endswith("); make one with `python -m loadtest trace`")


@pytest.mark.parametrize("command", [["replay"], ["compare", "--peer", "native"]])
def test_commands_say_that_a_file_is_no_trace_and_file_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "t.json", tmp_path / "out"
    path.write_text("{}")
    assert main([*command, str(path), "--out", str(out)]) == 1
    assert "is not a trace (it has no list of requests)" in capsys.readouterr().out
    path.write_bytes(holding())
    assert main([*command, str(path), "--out", str(out)]) == 1
    assert "the trace holds no requests" in capsys.readouterr().out
    assert list(out.iterdir()) == []


def test_a_trace_without_requests_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(tmp_path / "t.json"), "--rate", "0.001", "--duration", "1"]) == 1
    assert "no request comes at --rate 0.001 in --duration 1" in capsys.readouterr().out
    assert not (tmp_path / "t.json").exists()


LOOKUP = {"tier": "device", "adapter": "a", "hit": True, "bytes": 8, "load_s": None}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"tier": "\xff"}', "not UTF-8"),
        (b"[1]", "no JSON object"),
        (b"{}", "it lacks 'tier'"),
        (json.dumps({**LOOKUP, "load_s": "abc"}).encode(), "load_s is 'abc', not a number of seconds or null"),
        (json.dumps({**LOOKUP, "load_s": -1}).encode(), "load_s is -1, not"),
        (json.dumps({**LOOKUP, "load_s": inf}).encode(), "load_s is inf, not"),
        (json.dumps({**LOOKUP, "bytes": "8"}).encode(), "bytes is '8', not a whole number of bytes or null"),
        (json.dumps({**LOOKUP, "bytes": 8.5}).encode(), "bytes is 8.5, not"),
        (json.dumps({**LOOKUP, "bytes": True}).encode(), "bytes is True, not"),
        (json.dumps({**LOOKUP, "adapter": ["a"]}).encode(), "adapter is ['a'], not a text"),
    ],
)
def test_cache_replay_names_file_and_line(
    tmp_path: Path, line: bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(json.dumps(LOOKUP).encode() + b"\n" + line + b"\n")
    assert main(["cache-replay", str(path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert f"{path}, line 2: not a line that `peft-serve serve --cache-trace` writes ({why}" in said
    assert "busy" not in said
    assert list((tmp_path / "out").iterdir()) == []


def test_nobody_at_the_address_is_said_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        places = ["--base", "tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
        (tmp_path / "t.json").write_bytes(holding({**REQUEST, "adapter": "a00000"}))
        for command in (["upload"], ["compare", str(tmp_path / "t.json"), "--peer", "native"]):
            assert main([*command, "--url", url + "/", *places]) == 1
            said = capsys.readouterr().out
            assert f"nobody answers at {url} (" in said
            assert "start the server, or leave --url out" in said
    assert not (tmp_path / "work").exists()


def test_what_was_not_measured_is_null_in_the_file_and_nan_again(tmp_path: Path) -> None:
    origin = Provenance(date="2026-11-21 03:00", machine="m", software="s", commit="c", command="x")
    plot = Plot(title="t", x_label="x", y_label="y", series={"a": ((0.0, nan), (1.0, 2.0))})
    report = Report(
        name="x", title="", columns=("a", "b"), rows=(("one", nan), ("two", 2.5)), plot=plot, settings={"T0_s": nan}
    )
    report.file(tmp_path, origin)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    kept = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert kept["rows"] == [["one", None], ["two", 2.5]]
    assert kept["settings"] == {"T0_s": None}
    again = load_report(tmp_path)
    assert again.plot is not None
    assert isnan(float(again.rows[0][1]))
    assert isnan(again.plot.series["a"][0][1])
    assert again.rows[1] == ("two", 2.5)
    assert again.plot.series["a"][1] == (1.0, 2.0)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"name": "w4", "rows": 3}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is not a result"):
        load_report(tmp_path)


def test_a_replay_has_no_share_that_it_did_not_measure() -> None:
    figures = [row[0] for row in replay.report(summarise([]), [], closed=False).rows]
    assert "ttft_p99_s" in figures
    assert "share_in_time" not in figures


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    now = datetime(2026, 11, 21, 3, 0, 7)
    names = []
    for _ in range(3):
        with new_folder(tmp_path / "deep", "w4", now) as folder:
            (folder / "entry.md").write_text("")
            names.append(folder.name)
    assert names == ["20261121-030007-w4", "20261121-030007-w4-2", "20261121-030007-w4-3"]
    with new_folder(tmp_path / "deep", "w5", now) as folder:
        assert folder.is_dir()
    assert not folder.exists(), "nothing was put into it"
