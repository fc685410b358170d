"""The commands `task-tags` and `task-tags-admin`, run as a person runs them."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.servers import Servers


def environment(servers: Servers | None, **values: str) -> dict[str, str]:
    given = dict(servers.stack.environment) if servers else {}
    return {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **given, **values}


def run(
    servers: Servers | None,
    *arguments: str,
    module: str = "producers.cli",
    stdin: str = "",
    **values: str,
) -> subprocess.CompletedProcess[str]:
    code = f"from {module} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(servers, **values),
    )
