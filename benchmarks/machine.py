"""Describes what a figure depends on: the machine, the versions, and how long the process has been running."""

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_IMPORTED = time.perf_counter()


def seconds_since_process_start() -> float:
    """Wall-clock seconds since the system started this process, so the interpreter's start counts.

    Only Linux tells; elsewhere, seconds since the import of this module.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc_pid_stat(5), after boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError, ValueError):
        return time.perf_counter() - _IMPORTED


def describe_machine(device: str) -> dict[str, str | int | float]:
    """The names and sizes of the machine's parts."""
    import torch

    machine: dict[str, str | int | float] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["gpu_sms"] = properties.multi_processor_count
    return machine


def describe_versions() -> dict[str, str]:
    """The versions of the installed packages that affect the speed."""
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "triton", "transformers", "vllm", "nano-vllm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if "nano-vllm" not in versions:
        import nanovllm

        versions["nano-vllm"] = nanovllm.__version__
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
