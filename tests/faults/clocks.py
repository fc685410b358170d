"""A wall clock that can be stepped: of processes that are started with Debian's libfaketime.

Their monotonic clock goes on. Python can't be one of them: `time.sleep` fails there with EINVAL.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CACHE_SECONDS = 1
"""So long a process may not see a step."""


def find_library() -> Path | None:
    """Return the library; install it if that is allowed here."""
    if not _found() and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "--yes", "--quiet", "faketime"]
        subprocess.run(install, env=environment, capture_output=True, timeout=120)
    return _found()


def _found() -> Path | None:
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Clock:
    """The clock of some processes: what it is ahead, in seconds, stands in a file."""

    def __init__(self, library: Path, file: Path) -> None:
        self._file = file
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": str(CACHE_SECONDS),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.step(0)

    def step(self, seconds: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+}\n")
        new.chmod(0o644)
        new.rename(self._file)
