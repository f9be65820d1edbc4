"""Whether a server with these settings could start here, apart from its base: packages, torch, memory, disk, port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from peft_serve.commands.adapter_tables import size
from peft_serve.commands.checkup.finding import Finding, fine, odd, wrong
from peft_serve.commands.checkup.machine import Machine
from peft_serve.config import MIB, Settings

_OLDEST_PYTHON: Final = (3, 11)
_LIBRARY_OF: Final = {"bnb-nf4": "bitsandbytes", "bnb-int8": "bitsandbytes", "torchao-int8wo": "torchao"}
_OBJECT_STORES: Final = ("s3://", "gs://", "az://")
_LITTLE_DISK: Final = 256 * MIB


def look_at_installation(machine: Machine, settings: Settings, store: Path) -> Iterator[Finding]:
    """Everything that can be known without a base. `store` is the folder of uploads that would be used."""
    yield from _python(machine)
    yield from _packages(machine)
    yield from _extras(machine, settings)
    yield from _torch(machine, settings)
    yield from _threads(machine, settings)
    yield from _memory(machine, settings)
    yield from _store(machine, settings, store)
    yield from _folders(settings)
    yield from _port(machine, settings)


def _python(machine: Machine) -> Iterator[Finding]:
    found = ".".join(map(str, machine.python()))
    if machine.python() < _OLDEST_PYTHON:
        yield wrong("python", f"is {found}; peft-serve needs 3.11", "make a virtual environment with a newer Python")
    else:
        yield fine("python", found)


def _packages(machine: Machine) -> Iterator[Finding]:
    needed = [Requirement(text) for text in machine.requirements()]
    if not needed:
        yield odd("packages", "peft-serve is not installed as a package", "pip install peft-serve, or pip install -e .")
        return
    problems = 0
    for each in needed:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        found = machine.version(each.name)
        if found is None:
            problems += 1
            yield wrong(each.name, f"is not installed; {each.name}{each.specifier} is needed", f"pip install '{each}'")
        elif not each.specifier.contains(found, prereleases=True):
            problems += 1
            yield wrong(each.name, f"is {found}; {each.specifier} is needed", f"pip install -U '{each}'")
    if not problems:
        told = ", ".join(f"{name} {machine.version(name)}" for name in ("peft-serve", "torch", "transformers"))
        yield fine("packages", told)


def _extras(machine: Machine, settings: Settings) -> Iterator[Finding]:
    """What optional libraries these settings cannot do without."""
    wanted: list[tuple[str, str, str]] = []
    if settings.quantisation in _LIBRARY_OF:
        wanted.append(("--quantisation", _LIBRARY_OF[settings.quantisation], "quantised"))
    if settings.otlp_traces_endpoint is not None:
        wanted.append(("--otlp-traces-endpoint", "opentelemetry-sdk", "otel"))
    if any(source.startswith(_OBJECT_STORES) for source in settings.allow_source):
        wanted.append(("--allow-source", "obstore", "objects"))
    if settings.store is not None and settings.store.startswith("s3://"):
        wanted.append(("--store", "obstore", "s3"))
    for place, library, extra in wanted:
        if machine.version(library) is None:
            yield wrong(place, f"needs {library}, which is not installed", f"pip install 'peft-serve[{extra}]'")


def _torch(machine: Machine, settings: Settings) -> Iterator[Finding]:
    if machine.version("torch") is None:
        return  # told already
    build, has_device = machine.torch_cuda()
    install = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
    if settings.device == "cuda" and not has_device:
        if build is None:
            yield wrong("--device", "cuda is asked for and torch is a build for CPUs", install)
        else:
            yield wrong(
                "--device", f"cuda is asked for and torch (CUDA {build}) finds no device",
                "look at nvidia-smi and at the driver's version, or start with --device cpu",
            )  # fmt: skip
    elif settings.device == "auto" and not has_device and machine.has_nvidia():
        what = "is a build for CPUs" if build is None else f"(CUDA {build}) finds no device"
        yield odd("torch", f"this machine has an NVIDIA driver and torch {what}", install)
    else:
        yield fine("torch", f"CUDA {build}" if has_device else "runs on the CPU")


def _threads(machine: Machine, settings: Settings) -> Iterator[Finding]:
    cores, asked = machine.num_cores(), settings.num_threads
    if asked is not None and asked > cores:
        yield odd(
            "--num-threads", f"{asked} threads on {cores} cores wait for each other in every step",
            f"--num-threads {cores}, or one less under heavy streaming",
        )  # fmt: skip
    else:
        yield fine("threads", f"{asked or 'as many as torch takes'} on {cores} cores")


def _memory(machine: Machine, settings: Settings) -> Iterator[Finding]:
    free = machine.free_memory()
    if free is None:
        return
    on_device = settings.device_memory_bytes or settings.device_adapter_bytes + settings.kv_cache_bytes
    has_gpu = settings.device != "cpu" and machine.version("torch") is not None and machine.torch_cuda()[1]
    asked = settings.host_adapter_bytes + (0 if has_gpu else on_device)
    told = f"settings may take {size(asked)} beside the base; {size(free)} are free"
    if asked > free:
        yield wrong("memory", told, "lower --kv-cache-bytes, --host-adapter-bytes or --device-adapter-bytes")
    else:
        yield fine("memory", told)


def _store(machine: Machine, settings: Settings, store: Path) -> Iterator[Finding]:
    if store.exists() and not store.is_dir():
        yield wrong("--store", f"{store} is a file", "name a folder, or move the file away")
        return
    if not machine.can_write(store):
        yield wrong(
            "--store", f"{store} cannot be written by this user", "give the user the folder, or --store another"
        )
        return
    if not settings.store_shared and machine.is_locked(store / "lock"):
        yield wrong(
            "--store", f"{store} is in use by a server that runs; one server at a time",
            "stop that one, or give this one a --store of its own",
        )  # fmt: skip
        return
    set_aside = len([*(store / "quarantine").glob("*")])
    if set_aside:
        fact = f"{set_aside} adapters were set aside because their files were damaged"
        yield odd("--store", fact, "upload them again, and look at the disk")
    free = machine.free_disk(store)
    if free is None:
        return
    wanted = settings.max_adapter_bytes + settings.compiled_cache_bytes
    if free < _LITTLE_DISK:
        yield wrong(
            "disk",
            f"{size(free)} are free at {store}; uploads will be refused (507)",
            "make room, or --store elsewhere",
        )
    elif free < wanted:
        yield odd(
            "disk", f"{size(free)} are free at {store}; an upload and the compiled adapters may take {size(wanted)}",
            "make room, or lower --compiled-cache-bytes",
        )  # fmt: skip
    else:
        yield fine("store", f"{store}, {size(free)} free")


def _folders(settings: Settings) -> Iterator[Finding]:
    for folder in settings.adapters:
        if not folder.is_dir():
            yield wrong("--adapters", f"{folder}: there is no such folder", "check the path")
        elif not [folder / "adapter_config.json", *folder.glob("*/adapter_config.json")][-1].is_file():
            yield wrong(
                "--adapters", f"{folder} holds no checkpoint", "each sub-folder with an adapter_config.json is one"
            )


def _port(machine: Machine, settings: Settings) -> Iterator[Finding]:
    place = f"{settings.host}:{settings.port}"
    said = machine.can_listen(settings.host, settings.port) if settings.port else ""
    if said:
        yield wrong(
            "--port", f"{place}: cannot listen there ({said})", "stop what listens there, or give another --port"
        )
    else:
        yield fine("port", f"{place} is free")
