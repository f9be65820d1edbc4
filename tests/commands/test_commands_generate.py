"""`peft-serve generate`: prompts from everywhere, answers as lines, columns and JSON."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from peft_serve.commands.answers import Answer
from peft_serve.commands.columns import Columns, Lines, side_by_side
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.generate import view_for
from peft_serve.commands.speech import Speech
from tests.api.api_fakes import World
from tests.commands.conftest import run


def drawn(answers: list[Answer], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(side_by_side(answers, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_answer_is_written_as_it_comes(url: str, world: World) -> None:
    world.engine.says["hello you"] = "and you"
    said = run("generate", "hello", "you", "--url", url)
    assert (said.code, said.out, said.err) == (0, "and you\n", "")


def test_the_prompt_comes_from_arguments_a_file_or_stdin(url: str, world: World, tmp_path: Path) -> None:
    world.engine.says |= {"from a file": "one", "from a pipe": "two"}
    (tmp_path / "prompt.txt").write_text("from a file")
    assert run("generate", "--file", str(tmp_path / "prompt.txt"), "--url", url).out == "one\n"
    assert run("generate", "--url", url, stdin="from a pipe").out == "two\n"
    assert run("generate", "-f", "-", "--url", url, stdin="from a pipe").out == "two\n"
    assert run("generate", "--url", url, stdin="from a pipe\n").out == "two\n", "echo ends its line"
    nothing = run("generate", "--url", url, stdin="")
    assert (nothing.code, "stdin: holds no prompt" in nothing.err) == (2, True)
    written = run("generate", "", "--url", url)
    assert (written.code, "inputs" in written.err) == (4, True), "the server's business when it is written"
    both = run("generate", "words", "--file", str(tmp_path / "prompt.txt"), "--url", url)
    assert (both.code, "leave one of them out" in both.err) == (2, True)
    assert run("generate", "--file", str(tmp_path / "typo"), "--url", url).code == 2


def test_several_adapters_are_asked_at_once_and_told_apart(url: str, world: World) -> None:
    said = run("generate", "x", "-a", "plain", "-a", "soft", "-a", "base", "--url", url, "--max-new-tokens", "4")
    assert said.code == 0
    assert [line.split("]")[0] for line in said.out.splitlines()] == ["[plain", "[soft", "[base"]
    assert {request.adapter for request in world.engine.seen} == {
        world.adapters["plain"], world.adapters["soft"], "base"
    }  # fmt: skip
    found = run("generate", "x", "-a", "plain", "-a", "soft", "--url", url, "--json").json["answers"]
    assert [each["adapter"] for each in found] == ["plain", "soft"]
    assert found[0]["served_by"]["digest"] == world.adapters["plain"]
    assert found[0]["details"]["generated_tokens"] > 0
    assert found[0]["time_to_first_token_ms"] >= 0


def test_parameters_are_flags(url: str, world: World) -> None:
    flags = {
        "--max-new-tokens": "7", "--min-new-tokens": "1", "--temperature": "0.5", "--top-k": "9", "--top-p": "0.8",
        "--min-p": "0.1", "--typical-p": "0.9", "--repetition-penalty": "1.5", "--frequency-penalty": "0.25",
        "--presence-penalty": "0.75", "--seed": "11",
    }  # fmt: skip
    words = [word for pair in flags.items() for word in pair]
    said = run("generate", "x", "--url", url, *words, "--stop", "zz", "--ignore-eos", "-p", "top_n_tokens=2")
    assert said.code == 0
    sampling = world.engine.seen[-1].sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed) == (7, 1, 11)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 9, 0.8, 0.1)
    assert (sampling.typical_p, sampling.repetition_penalty) == (0.9, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.25, 0.75)
    assert (sampling.do_sample, sampling.ignore_eos, sampling.num_top_logprobs) == (True, True, 2)
    run("generate", "x", "--url", url, "--temperature", "0.5", "--greedy")
    assert not world.engine.seen[-1].sampling.do_sample


def test_choices_and_the_bare_model(url: str, world: World) -> None:
    chosen = run("generate", "x", "--url", url, "--choice", "yes", "--choice", "no")
    assert chosen.out.strip() in ("yes", "no")
    assert run("generate", "x", "-a", "complaints", "--url", url).out.strip() in ("complaint", "no complaint")
    run("generate", "x", "-a", "complaints", "--url", url, "--raw")
    assert world.engine.seen[-1].choices == ()
    assert run("generate", "x", "--url", url, "-p", "top_k").code == 2


@pytest.mark.parametrize("parameter", ["num_beams=2", "best_of=2", "n=2", "decoder_input_details=true"])
def test_what_cannot_be_streamed_comes_whole(url: str, world: World, parameter: str) -> None:
    words = ["generate", "x", "--url", url, "-n", "3", "-p", parameter, *([] if "beams" in parameter else ["--sample"])]
    said = run(*words)
    assert (said.code, bool(said.out.strip())) == (0, True), said.err
    (answer,) = run(*words, "--json").json["answers"]
    assert answer["generated_text"]
    assert answer["details"]["generated_tokens"] > 0
    assert (answer["tokens_per_s"], answer["total_ms"] > 0) == (None, True)


def test_a_reason_is_said_once(url: str) -> None:
    said = run("generate", "x", "--url", url, "--parameter", "top_p=7")
    assert said.err.count("top_p") == 1
    typo = run("generate", "x", "--url", url, "--parameter", "max_new_token=7")
    assert "did you mean max_new_tokens?" in typo.err


def test_refusals_are_told(url: str) -> None:
    said = run("generate", "x", "-a", "nobody", "--url", url)
    assert (said.code, said.out) == (4, "")
    assert "model_not_found: adapter 'nobody' does not exist" in said.err
    refused = run("generate", "x", "--url", url, "--parameter", "top_p=7", "--json")
    assert (refused.code, refused.json["error"]["status"]) == (4, 422)
    assert "top_p" in refused.json["error"]["message"]
    one_of_two = run("generate", "x", "-a", "plain", "-a", "nobody", "--url", url, "--json")
    assert one_of_two.code == 4
    assert [("error" in each) for each in one_of_two.json["answers"]] == [False, True]
    assert run("generate", "x", "--url", "http://127.0.0.1:1").code == 3


def test_a_stream_that_breaks_off_is_a_failure(url: str, world: World) -> None:
    world.engine.fails_after[world.adapters["plain"]] = RuntimeError("gone")
    said = run("generate", "x", "-a", "plain", "--url", url)
    assert said.code == 4
    assert said.out.endswith("\n")


def test_columns_stand_side_by_side_and_one_below_the_other_where_it_is_narrow() -> None:
    answers = [Answer(adapter="first[red]", text="one"), Answer(adapter="second", text="two", is_over=True)]
    wide = drawn(answers, 100)
    line = next(line for line in wide.splitlines() if "first[red]" in line)
    assert "second" in line, "names are text, and both stand in one line"
    assert "one batch" in wide
    assert "one▌" in wide, "an answer that goes on has a cursor"
    narrow = drawn(answers, 40).splitlines()
    assert not any("first[red]" in line and "second" in line for line in narrow)


def test_a_column_shows_a_failure_and_no_control_characters() -> None:
    failed = Answer(adapter="a", failure=CommandFailed(Exit.REFUSED, "is [not] there", code="model_not_found"))
    hostile = Answer(adapter="b", text="\x1b]0;title\x07\x9bred", is_over=True)
    page = drawn([failed, hostile], 100)
    assert "is [not] there" in page
    assert "model_not_found" in page
    assert "\x1b]0" not in page
    assert "\x9b" not in page


def test_columns_are_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    speech = Speech()
    assert isinstance(view_for(speech, ["a", "b"]), Lines)
    speech.out = Console(file=io.StringIO(), force_terminal=True, width=80)
    assert isinstance(view_for(speech, ["a", "b"]), Columns)
    assert isinstance(view_for(speech, ["a"]), Lines)
    with Columns(speech.out) as view:
        view.show([Answer(adapter="a"), Answer(adapter="b")])
        view.end([Answer(adapter="a", text="done"), Answer(adapter="b")])
    assert isinstance(speech.out.file, io.StringIO)
    assert "done" in speech.out.file.getvalue()


def test_an_answer_knows_its_speed() -> None:
    answer = Answer(adapter="a")
    token = {"token": {"text": "x", "special": False}, "generated_text": None}
    for now in (0.5, 0.75, 1.0):
        answer.take(token, now)
    assert answer.tokens_per_s == 4.0
    assert answer.figures == "3 tokens, first after 500 ms, 4.0 tokens/s"
    answer.take(token | {"generated_text": "xxx!", "details": {"generated_tokens": 4, "finish_reason": "length"}}, 1.25)
    assert (answer.text, answer.num_tokens) == ("xxx!", 4)
    assert answer.figures.endswith("length")
