"""The command `task-tags`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_at_interrupts() -> Iterator[None]:
    """Let Ctrl-C end this process at once, without a traceback, while it imports for a second."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


def main() -> None:
    """Run `producers.cli`."""
    with ending_at_interrupts():
        from producers.cli import main as run
    run()


if __name__ == "__main__":
    main()
