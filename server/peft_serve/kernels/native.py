"""C++ sources that ship with this package, compiled on the machine they run on and loaded into this process.

Owns the finding of a compiler, the cache of what was compiled, and the loading. A library is compiled once for its
sources, the compiler, its flags and this CPU, appears in the cache whole or not at all, and is the user's alone. It
computes on the threads of the OpenMP runtime that torch computes with, and on no others: two teams of threads in one
process cost more than they gain (docs/decisions/0003-one-team-of-threads.md). Knows no function of any library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

_NAMES: Final = ("c++", "g++", "clang++")
_FLAGS: Final = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared")
_SOURCES: Final = Path(__file__).parent


class NativeError(RuntimeError):
    """A library cannot be had on this machine; says which, why, and the way out."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler, GCC or Clang."""

    path: Path

    def identity(self) -> str:
        """Changes when the compiler is replaced."""
        real = self.path.resolve()
        facts = real.stat()
        return f"{real} {facts.st_size} {facts.st_mtime_ns}"


def find_compiler(environ: Mapping[str, str]) -> Compiler | None:
    """The compiler that $CXX names, else the first of c++, g++ and clang++ on $PATH."""
    names = [environ["CXX"]] if environ.get("CXX") else list(_NAMES)
    for name in names:
        found = shutil.which(name, path=environ.get("PATH", ""))
        if found is not None:
            return Compiler(Path(found))
    return None


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where compiled libraries are kept, as the XDG base directory specification has it."""
    root = environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "peft-serve" / "kernels"


class NativeCode:
    """Libraries made of this package's sources. Made once and handed to whoever needs one."""

    def __init__(
        self,
        compiler: Compiler | None,
        cache: Path,
        *,
        say: Callable[[str], None] = lambda _: None,
        timeout_s: float = 120.0,
        sources: Path = _SOURCES,
    ) -> None:
        self._compiler = compiler
        self._cache = cache
        self._say = say
        self._timeout_s = timeout_s
        self._sources = sources

    def library(self, *names: str) -> ctypes.CDLL:
        """The library of the sources `<name>.cpp`, with torch's threads.

        Raises NativeError where there is no compiler, or the sources do not compile or load.
        """
        built = self._built(names)
        try:
            library = ctypes.CDLL(str(built))
        except OSError as error:
            raise NativeError(f"{built} does not load ({error}); delete it, and it is made anew") from error
        _lend_threads(library)
        return library

    def _built(self, names: Sequence[str]) -> Path:
        compiler = self._compiler
        if compiler is None:
            raise NativeError("no C++ compiler was found; install g++ or clang++, or name one in $CXX")
        texts = [(self._sources / f"{name}.cpp").read_bytes() for name in names]
        texts += [path.read_bytes() for path in sorted(self._sources.glob("*.h"))]
        flags = (*_FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")
        libraries = () if "++" in compiler.path.name else ("-lstdc++",)  # gcc and clang link none by themselves
        told = " ".join((*flags, *libraries)).encode()
        key = _digest([*texts, told, compiler.identity().encode(), _cpu().encode()])
        try:
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            _expect_own(self._cache)
            built = self._cache / f"{'-'.join(names)}-{key}.so"
            if not built.exists():
                self._say(f"compiling {', '.join(names)} for this CPU, once")
                self._compile(compiler, flags, libraries, names, built)
        except OSError as error:
            raise NativeError(f"the cache of compiled code is not writable: {error}; set XDG_CACHE_HOME") from error
        return built

    def _compile(
        self, compiler: Compiler, flags: Sequence[str], libraries: Sequence[str], names: Sequence[str], built: Path
    ) -> None:
        sources = [str(self._sources / f"{name}.cpp") for name in names]
        with tempfile.TemporaryDirectory(dir=self._cache) as folder:
            made = Path(folder) / built.name
            command = [str(compiler.path), *flags, "-o", str(made), *sources, *libraries]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=self._timeout_s, check=False)
            except subprocess.TimeoutExpired as error:
                raise NativeError(f"{compiler.path} took longer than {self._timeout_s:g} s for {sources}") from error
            if done.returncode:
                raise NativeError(f"{compiler.path} does not compile {sources}: {done.stderr.strip()[:2000]}")
            made.replace(built)


def _lend_threads(library: ctypes.CDLL) -> None:
    """Give the library the functions by which torch's own OpenMP runtime starts a team; without them it has one thread.

    They are looked up through torch's library, so that the runtime is the one torch was linked with, under
    whatever name it ships.
    """
    lib = Path(torch.__file__).parent / "lib"
    for path in (lib / "libtorch_cpu.so", lib / "libtorch_cpu.dylib"):
        if not path.exists():
            continue
        runtime = ctypes.CDLL(str(path))
        if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_max_threads"):
            library.use_team(_address(runtime.GOMP_parallel), _address(runtime.omp_get_max_threads))
        return


def _address(function: object) -> ctypes.c_void_p:
    return ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]


def _expect_own(folder: Path) -> None:
    """Code is loaded from here: nobody else may write to it."""
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise NativeError(f"{folder} can be written by others than this user; chmod 700 it, or set XDG_CACHE_HOME")


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """What this CPU can do: code compiled for one may not run on another that shares a home folder."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.split("\t")[0].split(":")[0].strip() in wanted]
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *lines])
