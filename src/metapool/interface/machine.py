"""What a result was made on, as every result file says it."""

import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name.

    Returns:
        As Linux has it; elsewhere as Python does, or ``unknown``.
    """
    if (about := Path("/proc/cpuinfo")).is_file():
        for line in about.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def this_machine() -> dict[str, str | int]:
    """Processor, the instructions that torch uses of it, cores that this process may use, torch, and the platform.

    Returns:
        What a result file has under ``machine``.
    """
    return {
        "processor": processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
