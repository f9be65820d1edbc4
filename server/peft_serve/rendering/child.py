"""The process that runs chat templates: a line of JSON in, a line of JSON out, until its input ends.

`python -m peft_serve.rendering.child`. Templates run as transformers runs them, in its sandbox of jinja. What the
sandbox does not bound, the process does: its memory here, its time by whoever started it. It is given no file, and
can write none.
"""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO, Final

from jinja2.exceptions import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

MAX_TEXT_CHARS: Final = 1 << 20
MAX_MEMORY_BYTES: Final = 256 << 20  # beyond what the process has when it is ready
_MAX_ERROR_CHARS: Final = 300


def answer(asked: dict[str, Any]) -> dict[str, str]:
    """`text`, or `error` with `kind`: `syntax` for a template that is none, else `refused`."""
    try:
        rendered, _ = render_jinja_template(
            conversations=[asked["messages"]],
            chat_template=asked["template"],
            tools=asked.get("tools"),
            add_generation_prompt=True,
            **asked["words"],
        )
        text = str(rendered[0])
        text.encode()  # half a surrogate pair is no text
    except TemplateSyntaxError as error:
        return {"error": _told(error), "kind": "syntax"}
    except MemoryError:
        return {"error": "it takes too much memory", "kind": "refused"}
    except Exception as error:  # noqa: BLE001  # jinja raises whatever the template's author chose
        return {"error": _told(error), "kind": "refused"}
    if len(text) > MAX_TEXT_CHARS:
        return {"error": f"it writes {len(text)} characters, of at most {MAX_TEXT_CHARS}", "kind": "refused"}
    return {"text": text}


def _told(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text[:_MAX_ERROR_CHARS].encode("utf-8", "replace").decode()


def limit_memory(max_bytes: int) -> None:
    """Let this process have so much more memory, and write no file; where the system knows such limits."""
    try:
        import resource  # not on every system
    except ImportError:
        return
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        now = 1 << 30
    resource.setrlimit(resource.RLIMIT_AS, (now + max_bytes, now + max_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer line by line; the first line says that the process is ready."""
    sink.write(b"{}\n")
    sink.flush()
    for line in source:
        sink.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    limit_memory(MAX_MEMORY_BYTES)
    serve(sys.stdin.buffer, sys.stdout.buffer)
