"""The command `task-tags-admin`, in an installation that may lack what the worker needs."""

from __future__ import annotations

import signal


def main() -> None:
    """Run `worker.cli`, or say what to install: exit code 2. Ctrl-C ends it without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # the imports take a second
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from worker.cli import main as run
    except ModuleNotFoundError as error:
        from producers.console import fail

        fail(2, f"the worker is not installed: in a clone, pip install '.[worker]' ({error})")
    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
