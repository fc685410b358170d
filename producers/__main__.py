"""The command `task-tags`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run `producers.cli`. Ctrl-C ends it without a traceback, from its beginning."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # the imports take half a second
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from producers.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
