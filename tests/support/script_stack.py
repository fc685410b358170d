"""A stack for a script that measures: on a temporary directory, with tokens for everybody."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

from producers.contract.messages import TagBatch, add
from worker.auth import SCOPES, sign_token
from worker.local.stack import Stack, run_stack, signing_settings


@contextmanager
def script_stack(workers: int) -> Iterator[tuple[Path, Stack]]:
    """Run a stack on a directory that is removed afterwards; yield both."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        with run_stack(directory, port=0, workers=workers, say=print) as stack:
            yield directory, stack


def tokens(directory: Path) -> Callable[[UUID], str]:
    """Return what signs a token for any organization of the stack on a state directory."""
    key = signing_settings(directory)
    return lambda organization_id: sign_token(
        key,
        organization_id=organization_id,
        actor="own stack",
        scopes=SCOPES,
        lifetime=timedelta(hours=3),
    )


def make_batches(count: int) -> list[TagBatch]:
    """Make batches of ten operations, all on one execution."""
    execution = uuid4()
    return [
        TagBatch(
            tags=[
                add(execution, f"task-{i}", "review_status", f"t{number}", {"reviewer": "ada"})
                for i in range(10)
            ],
        )
        for number in range(count)
    ]
