"""Peers: whoever can be asked to play a trace, so that one trace can be put to several and the answers compared.

A peer is named on the command line:

- ``native``, ``openai``: this server, by its own route or by OpenAI's, started for each pass (or at ``--url``);
- ``openai:NAME=URL`` (or ``URL#BASE-MODEL``): any OpenAI-compatible server that runs already. Adapters are asked
  for as models of their names;
- ``llamacpp:NAME=URL``: llama.cpp's server, started with the adapters' files (see `loadtest.llama_server`);
- ``peft:single``, ``peft:mixed``, ``peft:sorted``: the loops of `loadtest.peft_plan`.
"""

from collections.abc import Sequence
from typing import Protocol

from loadtest.outcome import Outcome
from loadtest.peft_plan import Mode
from loadtest.trace import Trace

MODES: tuple[Mode, ...] = ("single", "mixed", "sorted")
FORMS = "native, openai, openai:NAME=URL, llamacpp:NAME=URL, peft:single, peft:mixed or peft:sorted"


class Peer(Protocol):
    """One contestant."""

    @property
    def name(self) -> str:
        """What the tables call it; no two peers of a comparison share one."""
        ...

    def prepare(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Make sure that the base and these adapters can be asked for. Answers with what a reader of the figures
        must know; RuntimeError, naming what is missing and how to mend it, if they cannot."""
        ...

    def play(self, trace: Trace, *, paced: bool) -> list[Outcome]:
        """Play the whole trace once: at its own pace, or as a backlog that is all there from the start. Outcomes
        come in the order of the trace, with the answers' texts. RuntimeError if the peer fails as a whole."""
        ...


def population(adapters: Sequence[str]) -> int:
    """How many of the load test's numbered adapters (a00000, a00001, ...) it takes to hold these names; ValueError
    for a name that is none of them."""
    strangers = [name for name in adapters if name[:1] != "a" or not name[1:].isdecimal()]
    if strangers:
        raise ValueError(
            f"adapter {strangers[0]!r} of the trace is not one that `make-adapters` makes (a00000, a00001, ...), so "
            "this server and peft's loops cannot be given it; make the trace with `python -m loadtest trace`"
        )
    return max((int(name[1:]) + 1 for name in adapters), default=0)
