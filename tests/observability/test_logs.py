"""Log lines: one a record whatever is in it, the same from every logger, in both formats."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from peft_serve.logs import MAX_CHARS, LogFormat, configure_logs, escaped

NASTY = "x\n2026-01-01 ERROR forged: line\r\x1b[31mred\x1b[0m\x85\u2028\u202e\x7f\x00 end"


@pytest.fixture
def lines() -> Iterator[Any]:
    """Says a format, and gives what has been written since as lines."""
    root = logging.getLogger()
    level, earlier = root.level, list(root.handlers)
    buffer = io.StringIO()

    def start(log_format: LogFormat, level_name: str = "info") -> Any:
        configure_logs(level_name, log_format, lambda: buffer)
        return lambda: buffer.getvalue().split("\n")[:-1]

    yield start
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in [each for each in root.handlers if each not in earlier]:
        root.removeHandler(handler)


def fail() -> None:
    raise ValueError(f"adapter {NASTY}")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_begins_a_line_or_moves_a_cursor(lines: Any, log_format: LogFormat) -> None:
    written = lines(log_format)
    logger = logging.getLogger("peft_serve.test")
    logger.info("said %s", NASTY, extra={"fields": {"path": NASTY, "adapter": NASTY}})
    try:
        fail()
    except ValueError:
        logger.exception("failed with %s", NASTY)
    for line in written():
        assert line.isprintable(), line
        assert not line.startswith("2026-01-01 ERROR")
    beginnings = [line for line in written() if not line.startswith("  | ")]
    assert len(beginnings) == 2, "one record, one line; a traceback's lines are set in"


def test_a_json_line_gives_back_what_was_said(lines: Any) -> None:
    written = lines("json")
    fields = {"path": NASTY, "status": 200, "total_ms": 1.5, "level": "none", "other": object}
    logging.getLogger("peft_serve.test").warning("said %s", NASTY, extra={"fields": fields})
    (line,) = written()
    content = json.loads(line)
    assert content["message"] == f"said {NASTY}"
    assert content["path"] == NASTY
    assert (content["status"], content["total_ms"]) == (200, 1.5)
    assert content["level"] == "warning", "a field cannot take the place of the record's own"
    assert content["logger"] == "peft_serve.test"
    assert content["time"].endswith("Z")
    assert "exception" not in content


def test_a_traceback_is_one_field_of_json(lines: Any) -> None:
    written = lines("json")
    try:
        fail()
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = written()
    assert json.loads(line)["exception"].splitlines()[0] == "Traceback (most recent call last):"


def test_text_values_can_be_told_apart(lines: Any) -> None:
    written = lines("text")
    fields = {"path": "/generate", "odd": 'a b="c"', "status": 200, "ttft_ms": 0.25}
    logging.getLogger("peft_serve.access").info("request", extra={"fields": fields})
    (line,) = written()
    assert line.endswith('INFO peft_serve.access: request path=/generate odd="a b=\\"c\\"" status=200 ttft_ms=0.25')


def test_every_library_and_pythons_warnings_speak_alike(lines: Any) -> None:
    written = lines("json", "warning")
    logging.getLogger("some.library").warning("from a library")
    logging.getLogger("peft_serve.engine").info("not asked for")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("from Python", UserWarning, stacklevel=1)
    loggers = [json.loads(line)["logger"] for line in written()]
    assert loggers == ["some.library", "py.warnings"]


def test_what_a_library_quotes_of_callers_is_not_written(lines: Any) -> None:
    written = lines("text", "debug")
    parser = MultipartParser(b"x")
    with pytest.raises(MultipartParseError):
        parser.write(b"--x\r\nfalse alarm: the disk is on fire")
    parser.logger.error("of ours")
    (line,) = written()
    assert line.endswith("of ours")


def test_to_configure_twice_is_to_write_once(lines: Any) -> None:
    lines("json")
    written = lines("text")
    logging.getLogger("x").info("once")
    assert len(written()) == 1


@pytest.mark.parametrize("name", ["huggingface_hub", "transformers"])
def test_a_library_that_writes_by_itself_is_written_once(lines: Any, name: str) -> None:
    logger, own = logging.getLogger(name), io.StringIO()
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [logging.StreamHandler(own)], name == "huggingface_hub"
    try:
        written = lines("text")
        logging.getLogger(f"{name}.part").warning("come back later")
        assert [line.endswith("come back later") for line in written()] == [True]
        assert own.getvalue() == ""
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def test_a_long_message_is_cut(lines: Any) -> None:
    written = lines("json")
    logging.getLogger("x").info("y" * (MAX_CHARS + 5))
    (line,) = written()
    assert json.loads(line)["message"].endswith("(5 more characters)")


def test_what_is_shown_is_left_as_it_is() -> None:
    assert escaped("größe ✓ \\n") == "größe ✓ \\n"
    assert escaped("a\tb") == "a\\tb"
