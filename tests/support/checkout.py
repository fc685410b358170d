"""The repository of these tests: its directory, and the files that belong to it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def listed_files() -> Iterator[str]:
    """Yield the names of the files that git tracks, or would, as far as they exist."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    yield from (name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file())
