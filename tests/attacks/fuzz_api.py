"""Schemathesis against a server over fakes: every route of the OpenAPI page, by its schema and against it.

``python -m tests.attacks.fuzz_api PROGRAM`` runs the `st` of an environment of its own (`make fuzz-api` makes it): no
answer may be a 5xx, of a status or a type that the page does not name, or of another form. Streams without an end and
the page of the figures are left out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from tests.api.api_fakes import make_world
from tests.api.conftest import populate, running, served
from tests.conftest import make_tiny_tokenizer

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
WITHOUT_END = ("/v1/events", "/metrics")


def main() -> int:
    """The exit status of schemathesis."""
    parser = ArgumentParser(prog="python -m tests.attacks.fuzz_api", description=__doc__)
    parser.add_argument("program", type=Path, help="schemathesis' own command, st")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--examples", type=int, default=20, help="cases for each route, at most")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(make_tiny_tokenizer(), Path(folder))
        populate(world)
        with running(world), served(world) as url:
            command = [str(parsed.program), "run", f"{url}/openapi.json", "-c", CHECKS, "-n", str(parsed.examples)]
            command += ["--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--request-timeout", "10"]
            command += ["--max-time", str(parsed.seconds), "--no-shrink", "--generation-database", "none"]
            for path in WITHOUT_END:
                command += ["--exclude-path", path]
            return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
