"""How log records are written: each of them one record to a reader, as text or as JSON, whatever is in it.

Owns the two formatters and the set-up of the root logger, which every library's records reach too. Names, paths and
error messages that callers chose pass through here: nothing in them can begin a line, move a cursor or hide a word.
Facts beside the message come as `extra={"fields": {...}}`. Knows nothing of requests.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

LogFormat = Literal["text", "json"]

MAX_CHARS: Final = 16_384
"""Of a message or a traceback; the rest is cut. No record is worth more, and a caller can make some of them long."""

_WITH_HANDLERS: Final = ("huggingface_hub", "transformers")
_OF_CALLERS: Final = ("python_multipart",)  # warns of every malformed form, in bytes that its sender chose
_PLAIN = re.compile(r"[!#-<>-~]+")  # printable ASCII without space, quote and equals sign


def configure_logs(level: str, log_format: LogFormat, stream_of: Callable[[], TextIO] = lambda: sys.stderr) -> None:
    """Write every logger's records from `level` on, in one format; warnings of Python's as well.

    `stream_of` gives the stream for each record. Said again, it replaces what was said before.
    """
    handler = _Writer(stream_of)
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter())
    for name in _WITH_HANDLERS:  # their own would write each record once more, or keep it from coming here
        logger = logging.getLogger(name)
        logger.handlers = [each for each in logger.handlers if not isinstance(each, logging.StreamHandler)]
        logger.propagate = True
    for name in _OF_CALLERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each, _Writer)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class _Writer(logging.Handler):
    def __init__(self, stream_of: Callable[[], TextIO]) -> None:
        super().__init__()
        self._stream_of = stream_of

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = self._stream_of()
            stream.write(f"{self.format(record)}\n")
            stream.flush()
        except Exception:  # noqa: BLE001  # as every handler of logging: a record is not worth the work it tells of
            self.handleError(record)


def escaped(text: str) -> str:
    """`text` without a character that is not shown: newlines, terminal and direction controls as `\\n`, `\\u202e`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value ..`; lines of a traceback begin with a bar."""

    def format(self, record: logging.LogRecord) -> str:
        said = [_time(record), record.levelname, f"{record.name}:", escaped(_message(record))]
        said += [f"{name}={_value(value)}" for name, value in _fields(record).items()]
        line = " ".join(said)
        trace = _traceback(self, record)
        return line if trace is None else "\n".join([line, *(f"  | {escaped(each)}" for each in trace.split("\n"))])


class JSONFormatter(logging.Formatter):
    """One object a line, in ASCII: `time`, `level`, `logger`, `message`, the record's fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        content |= {name: value for name, value in _fields(record).items() if name not in content}
        trace = _traceback(self, record)
        if trace is not None:
            content["exception"] = trace
        return _json(content)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    return _cut(record.getMessage())


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return _cut("\n".join(parts)) if parts else None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} .. ({len(text) - MAX_CHARS} more characters)"


def _value(value: object) -> str:
    text = value if isinstance(value, str) else _json(value)
    return text if not isinstance(value, str) or _PLAIN.fullmatch(text) else _json(text)


def _json(value: object) -> str:
    # DEL is the one control character that ASCII JSON leaves as it is.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), default=str).replace("\x7f", "\\u007f")
