"""Compiling: once for each source, compiler and CPU; a machine that cannot says so and how it could."""

from __future__ import annotations

import ctypes
import os
import stat
import time
from pathlib import Path

import pytest
import torch

from peft_serve.kernels import native
from peft_serve.kernels.native import Compiler, NativeCode, NativeError, cache_folder, find_compiler

COMPILER = find_compiler(os.environ)
SOURCE = """
#include "team.h"
extern "C" void squares(long n, long* out, long* threads) {
  *threads = team::num_threads();
  team::share(n, 2, [=](long first, long last) { for (long i = first; i < last; ++i) out[i] = i * i; });
}
"""
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "squares.cpp").write_text(SOURCE)
    (folder / "team.h").write_bytes(Path(native.__file__).with_name("team.h").read_bytes())
    return folder


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_library_computes_on_torchs_threads(sources: Path, tmp_path: Path, num_threads: int) -> None:
    runtimes = _openmp_runtimes()
    library = NativeCode(COMPILER, tmp_path / "cache", sources=sources).library("squares")
    out, threads = (ctypes.c_long * 101)(), ctypes.c_long()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        library.squares(ctypes.c_long(101), out, ctypes.byref(threads))
    finally:
        torch.set_num_threads(before)
    assert list(out) == [i * i for i in range(101)]
    assert threads.value == num_threads
    assert _openmp_runtimes() == runtimes, "the library brought a runtime of its own"


class _LateTeam:
    """A runtime whose other thread is late: this one waits for it before its work, or behind it."""

    def __init__(self, *, before_s: float = 0.0, behind_s: float = 0.0) -> None:
        self.num_started = 0
        self.before_s, self.behind_s = before_s, behind_s
        work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

        def start(function: int, facts: int, _num_threads: int, _flags: int) -> None:
            self.num_started += 1
            time.sleep(self.before_s)
            work(function)(facts)
            time.sleep(self.behind_s)

        self.start = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(start)
        self.num_threads = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 2)

    def serve(self, library: ctypes.CDLL) -> None:
        library.use_team(*(ctypes.cast(f, ctypes.c_void_p) for f in (self.start, self.num_threads)))


@needs_compiler
@pytest.mark.parametrize("late", [{"before_s": 0.004}, {"behind_s": 0.004}])
def test_who_waits_too_long_for_a_team_works_alone_for_a_while(
    sources: Path, tmp_path: Path, late: dict[str, float]
) -> None:
    library = NativeCode(COMPILER, tmp_path / "cache", sources=sources).library("squares")
    team = _LateTeam(**late)
    team.serve(library)
    out, threads = (ctypes.c_long * 101)(), ctypes.c_long()

    def run() -> None:
        out[100] = 0
        library.squares(ctypes.c_long(101), out, ctypes.byref(threads))
        assert out[100] == 10000, "the work is done, whoever does it"

    for _ in range(3):
        run()
    assert team.num_started == 3, "single waits are the price of a team"
    for _ in range(200):
        run()
    assert team.num_started < 20, "alone, but for a trial after each break"
    team.before_s = team.behind_s = 0.0
    deadline = time.monotonic() + 60
    while team.num_started < 100 and time.monotonic() < deadline:
        run()
    assert team.num_started >= 100, "a team that is in time again is used again"


def _openmp_runtimes() -> set[str]:
    """The files of OpenMP runtimes in this process, where the system tells; other packages may have brought some."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split()[-1] for line in lines if "omp" in line.rpartition("/")[2]}


@needs_compiler
def test_what_was_compiled_is_kept_until_its_source_changes(sources: Path, tmp_path: Path) -> None:
    said: list[str] = []
    code = NativeCode(COMPILER, tmp_path / "cache", say=said.append, sources=sources)
    code.library("squares")
    code.library("squares")
    assert len(said) == 1
    (sources / "team.h").write_text((sources / "team.h").read_text() + "// changed\n")
    code.library("squares")
    assert len(said) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2  # two libraries, and nothing half done
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_without_a_compiler_the_message_has_the_way_out(tmp_path: Path) -> None:
    assert find_compiler({"PATH": ""}) is None
    assert find_compiler({"PATH": os.environ["PATH"], "CXX": "no-such-compiler"}) is None
    with pytest.raises(NativeError, match="install g\\+\\+ or clang"):
        NativeCode(None, tmp_path).library("few_rows")


@needs_compiler
def test_a_source_that_does_not_compile_is_named_and_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    (sources / "squares.cpp").write_text("this is no C++")
    with pytest.raises(NativeError, match=r"squares\.cpp"):
        NativeCode(COMPILER, tmp_path / "cache", sources=sources).library("squares")
    assert not list((tmp_path / "cache").iterdir())


def test_a_compiler_that_hangs_is_given_up(sources: Path, tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o700)
    with pytest.raises(NativeError, match=r"longer than 0\.2 s"):
        NativeCode(Compiler(sleeper), tmp_path / "cache", timeout_s=0.2, sources=sources).library("squares")


def test_a_library_that_does_not_load_is_named(sources: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text('#!/bin/sh\nfor each; do [ "$last" = -o ] && echo no library > "$each"; last=$each; done\nexit 0\n')
    bad.chmod(0o700)
    with pytest.raises(NativeError, match="delete it"):
        NativeCode(Compiler(bad), tmp_path / "cache", sources=sources).library("squares")


def test_code_is_loaded_from_the_users_own_folder_only(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(NativeError, match="can be written by others"):
        NativeCode(Compiler(Path("/bin/sh")), cache, sources=sources).library("squares")


def test_a_cache_that_cannot_be_written_is_refused(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeError, match="XDG_CACHE_HOME"):
        NativeCode(Compiler(Path("/bin/sh")), tmp_path / "file" / "cache", sources=sources).library("squares")


def test_the_cache_follows_the_base_directory_specification() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/peft-serve/kernels")
    assert cache_folder({}) == Path.home() / ".cache/peft-serve/kernels"


@pytest.mark.parametrize(("name", "is_linked"), [("gcc", True), ("clang", True), ("g++", False), ("clang++-18", False)])
def test_a_driver_made_for_c_is_told_of_the_library_of_cpp(
    sources: Path, tmp_path: Path, name: str, is_linked: bool
) -> None:
    driver, told = tmp_path / name, tmp_path / "told"
    driver.write_text(f'#!/bin/sh\necho "$@" > {told}\nexit 1\n')
    driver.chmod(0o700)
    with pytest.raises(NativeError, match="does not compile"):
        NativeCode(Compiler(driver), tmp_path / "cache", sources=sources).library("squares")
    assert told.read_text().strip().endswith(".cpp -lstdc++") is is_linked
