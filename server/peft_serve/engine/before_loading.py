"""What is refused before a base is loaded, which may take minutes: settings that this machine cannot do.

Knows settings, folders and the device. What takes the base to tell is refused by whoever builds from it.
"""

from __future__ import annotations

from peft_serve.config import Settings
from peft_serve.engine.gpu_graphs import ON_A_CPU
from peft_serve.engine.gpu_kernels import NoGpuKernels, load_kernels
from peft_serve.model.loader import resolve_device


def check_folders(settings: Settings) -> None:
    """ValueError names a folder that is to be read and is not there."""
    for option, folders in (("--adapters", settings.adapters), ("--watch", settings.watch)):
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{option} {folder}: there is no such folder; check the path")


def check_settings(settings: Settings) -> None:
    """ValueError says which setting cannot be done here, and the way out."""
    check_folders(settings)
    device = resolve_device(settings.device)
    if settings.gpu_kernels == "on":
        try:
            load_kernels(device)
        except NoGpuKernels as error:
            raise ValueError(f"--gpu-kernels on: {error}; or leave the option out") from error
    if settings.cuda_graphs == "on":
        if device.type != "cuda":
            raise ValueError(f"--cuda-graphs on: {ON_A_CPU}; or leave the option out")
        if settings.gpu_kernels == "off":
            raise ValueError("--cuda-graphs on: graphs need our own GPU kernels; leave --gpu-kernels off out")
