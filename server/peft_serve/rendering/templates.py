"""Chat templates of uploads, rendered with bounds on time, memory and text.

Owns one child process that runs them (`rendering.child`): started when it is first needed, killed when a template
takes too long, started again for the next. A template that never ends costs its own request, and the others that
wait for a template at most the time limit. Knows no adapter and no tokenizer.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from peft_serve.errors import QueueFull, Unavailable

MAX_REPLY_BYTES: Final = 16 << 20
"""A reply of the child: the longest text, each character escaped."""

_NEEDED: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "TZ", "SYSTEMROOT")
"""What the child may know of the server's environment, where operators keep their secrets."""

_CHUNK_BYTES: Final = 1 << 16
_RETRY_AFTER_S: Final = 2.0


class TemplateError(Exception):
    """A template that cannot be rendered; `is_syntax`: none at all, whatever the messages."""

    def __init__(self, message: str, *, is_syntax: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.is_syntax = is_syntax


class ChatTemplates:
    """See the module's docstring. Thread-safe: one template is rendered at a time."""

    def __init__(
        self,
        *,
        time_limit_s: float = 2.0,
        start_limit_s: float = 60.0,
        max_waiting: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start_limit_s` is for the child's start; more than `max_waiting` awaited renderings are refused."""
        self._time_limit_s = time_limit_s
        self._start_limit_s = start_limit_s
        self._max_waiting = max_waiting
        self._clock = clock
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._num_waiting = 0
        # A thread of its own: those that everybody shares must not wait for somebody's template.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-templates")

    async def rendered(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        words: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """As `render`, beside the event loop, always the same one. Raises QueueFull too."""
        if self._num_waiting >= self._max_waiting:
            raise QueueFull(
                f"{self._max_waiting} requests wait for chat templates of adapters; try again in a moment",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self.render, template, messages, words, tools)
        finally:
            self._num_waiting -= 1

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        words: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The messages in the template's words, with what makes the model answer behind them.

        `words` are the special tokens by the names that templates know (`eos_token`), `tools` what the model may
        call, in OpenAI's words. Raises TemplateError, and Unavailable when the child does not start.
        """
        plain = [{name: value for name, value in message.items() if value is not None} for message in messages]
        asked = {"template": template, "messages": plain, "words": dict(words), "tools": [*tools] or None}
        line = json.dumps(asked).encode() + b"\n"
        with self._lock:
            reply = self._asked(line)
        if "text" in reply:
            return str(reply["text"])
        raise TemplateError(str(reply.get("error")), is_syntax=reply.get("kind") == "syntax")

    def close(self) -> None:
        """End the child; nothing can be awaited after this."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._stop()

    def _asked(self, line: bytes) -> Mapping[str, Any]:
        child = self._started()
        assert child.stdin is not None, "the child is started with pipes"
        try:
            child.stdin.write(line)
            child.stdin.flush()
            return self._read(child, self._time_limit_s)
        except TimeoutError:
            self._stop()
            raise TemplateError(f"it takes more than {self._time_limit_s:g} s") from None
        except (OSError, ValueError):  # it died of the template, or what it said is no reply
            self._stop()
            raise TemplateError("it takes too much memory, or breaks what runs it") from None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._stop()
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "peft_serve.rendering.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _NEEDED if name in os.environ} | {"USE_TORCH": "0"},
            start_new_session=True,  # a Ctrl-C is for the server, which ends it when requests have ended
        )
        try:
            self._read(self._child, self._start_limit_s)
        except (OSError, ValueError) as error:
            self._stop()
            raise Unavailable(
                "the process for chat templates does not start; the operator can tell why, or ask without messages",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        return self._child

    def _read(self, child: subprocess.Popen[bytes], limit_s: float) -> Mapping[str, Any]:
        """One line of the child's as an object; raises TimeoutError, OSError and ValueError."""
        assert child.stdout is not None, "the child is started with pipes"
        deadline, found = self._clock() + limit_s, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                left = deadline - self._clock()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                chunk = os.read(child.stdout.fileno(), _CHUNK_BYTES)
                found += chunk
                if not chunk or len(found) > MAX_REPLY_BYTES:
                    raise ValueError("the child's reply is cut off or too long")
        reply = json.loads(found)
        if not isinstance(reply, dict):
            raise ValueError("the child's reply is no object")
        return reply

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None, "the child is started with pipes"
            with suppress(OSError):  # what was not yet written to a dead child
                pipe.close()
