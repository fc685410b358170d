"""The command `task-tags-admin`, in an installation that may lack what the worker needs."""

from __future__ import annotations

from producers.__main__ import ending_at_interrupts


def main() -> None:
    """Run `worker.cli`, or say what to install: exit code 2."""
    try:
        with ending_at_interrupts():
            from worker.cli import main as run
    except ModuleNotFoundError as error:
        from producers.console import fail

        fail(2, f"the worker is not installed: in a clone, pip install '.[worker]' ({error})")
    run()


if __name__ == "__main__":
    main()
