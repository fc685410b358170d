"""How much memory a process has, in megabytes of 1024 × 1024 bytes (proc(5): VmRSS and VmHWM)."""

from __future__ import annotations

import os
from pathlib import Path


def resident(pid: int) -> float:
    return _status(pid, "VmRSS:")


def max_resident(pid: int) -> float:
    """The most that it ever had."""
    return _status(pid, "VmHWM:")


def _status(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(name)[2].split()[0]) / 1024


def open_files(pid: int) -> int:
    """Return how many files and connections a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
