"""Two server processes upload to one name at the same moment, over and over: each upload is a version of its own, and
both agree in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from tests.adapters.shared.object_services import environment, object_service

HERE = Path(__file__).parents[3]
NUM_ROUNDS = 20


class Rival:
    def __init__(self, store: str, seed: int, variables: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.adapters.shared.rivals", store, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(20)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def tell(self, words: str) -> None:
        self._pipe(self._process.stdin).write(words)
        self._pipe(self._process.stdin).flush()

    def end(self) -> dict[str, Any]:
        self._pipe(self._process.stdin).close()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        assert line, "the process has ended; what it said is above"
        found: dict[str, Any] = json.loads(line)
        return found

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@pytest.fixture(params=["folder", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where the store is, and the variables with which it is found."""
    if request.param == "folder":
        yield str(tmp_path / "store"), {}
        return
    with object_service() as address:
        yield f"s3://bucket/{tmp_path.name}", environment(address)


def test_two_processes_that_upload_one_name_at_the_same_moment(place: tuple[str, dict[str, str]]) -> None:
    store, variables = place
    told: list[tuple[int, str]] = []
    num_moved = 0
    with ExitStack() as stack:
        rivals = [stack.enter_context(Rival(store, seed, variables)) for seed in (1, 2)]
        for rival in rivals:
            assert rival.hear() == {"ready": True}
        for number in range(NUM_ROUNDS):
            for rival in rivals:
                rival.tell(f"{number}\n")
            for rival in rivals:
                assert rival.hear() == {"kept": True}
            for rival in rivals:
                rival.tell("now\n")
            for rival in rivals:
                answer = rival.hear()
                told.append((answer["number"], answer["id"]))
                num_moved += answer["num_moved"]
        ends = [rival.end() for rival in rivals]
    print(f"{2 * NUM_ROUNDS} uploads; {num_moved} times another process was first")
    assert num_moved >= NUM_ROUNDS, "each time both had seen the same record, and one of them was second"
    told.sort()
    assert [number for number, _ in told] == list(range(1, 2 * NUM_ROUNDS + 1)), "none was given twice, or left out"
    assert len({adapter for _, adapter in told}) == 2 * NUM_ROUNDS
    for end in ends:
        assert [tuple(each) for each in end["versions"]] == told, "nobody's upload is lost"
        assert tuple(end["current"]) == told[-1]
