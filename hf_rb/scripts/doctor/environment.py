"""Versions of libraries, the C compiler and the devices, as `hf-rb doctor` prints them."""

import os
import platform
import subprocess
from importlib import metadata

from hf_rb import __version__
from hf_rb.io.native import compiler
from hf_rb.utils.optional import EXTRAS


__all__ = ["environment"]

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "optimum",
)
OPTIONAL = ("vllm", "deepspeed", "liger-kernel", *(name for name, _ in EXTRAS.values()))


def environment() -> dict[str, str]:
    """Returns versions by name, `"not installed"` for a library that is not there. Imports torch for the devices."""
    found = {
        "hf_rb": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    found |= {name: _version(name) for name in (*LIBRARIES, *sorted(OPTIONAL))}
    return found | {"C compiler": _compiler(), "devices": _devices()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    try:
        command = compiler()
        output = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"{error} The kernels and the solver for CPUs run by torch."
    return output.partition("\n")[0]


def _devices() -> str:
    try:
        import torch
    except ImportError:
        return "unknown without torch"
    cpu = f"cpu ({os.cpu_count()} cores, torch uses {torch.get_num_threads()})"
    if not torch.accelerator.is_available():
        return cpu
    kind = torch.accelerator.current_accelerator()
    names = [torch.get_device_module(kind).get_device_name(i) for i in range(torch.accelerator.device_count())]
    return ", ".join([cpu, *names])
