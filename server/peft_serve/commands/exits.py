"""How a command ends: the five exit codes, and the one way to say why."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Exit(IntEnum):
    """The exit codes of every command. 2 is also what the command line itself says of a wrong option."""

    OK = 0
    FAILED = 1  # it was done, and came out badly
    USAGE = 2  # what was asked for cannot be asked
    UNREACHABLE = 3  # no server answers at the address
    REFUSED = 4  # the server says no


def exit_of(refusal: Exception) -> Exit:
    """How a server's start ends that was refused: a ValueError says which setting is to be changed. Everything else (a
    port or a store in use, a disk that is full) may be gone the next time, with the same settings."""
    return Exit.USAGE if isinstance(refusal, ValueError) else Exit.FAILED


class CommandFailed(Exception):  # noqa: N818  named as an outcome
    """Ends a command. `errors` are (place, reason), as a refused upload has them."""

    def __init__(
        self, exit_code: Exit, message: str, *, code: str = "", status: int | None = None,
        errors: Sequence[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message
        self.code = code or exit_code.name.lower()
        self.status = status
        self.errors = tuple(errors)
