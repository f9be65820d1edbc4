"""The command `peft-serve`, or `python -m peft_serve`: Ctrl-C ends it in order before its parts are imported, too."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # as shells tell of a process that SIGINT ended


def main() -> None:
    """The entry point of the console script."""
    try:
        from peft_serve.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
