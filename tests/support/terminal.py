"""A command in a terminal of its own, of 80 columns, whose keys a test presses."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROWS_AND_COLUMNS = (24, 80)


class Terminal:
    """What a command has said, and where its keys go."""

    def __init__(self, process: subprocess.Popen[bytes], file: int) -> None:
        self.process = process
        self.said = ""
        self._file = file

    def press(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def await_words(self, words: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.said:
            assert time.monotonic() < deadline, self.said
            assert self._read(), self.said

    def await_end(self, seconds: float = 30) -> int:
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.said
        return self.process.wait(seconds)

    def _read(self) -> bool:
        """Take what comes within a second; return whether more may come."""
        if not select.select([self._file], [], [], 1)[0]:
            return True
        try:
            read = os.read(self._file, 65536)
        except OSError:  # the last process has closed it
            return False
        self.said += read.decode().replace("\r\n", "\n")
        return bool(read)


@contextmanager
def in_terminal(argv: list[str], cwd: Path, environment: dict[str, str]) -> Iterator[Terminal]:
    """Run a command until the block ends; then Ctrl-C ends it, if it still runs."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *ROWS_AND_COLUMNS, 0, 0))
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=_control_terminal,
    )
    os.close(its)
    terminal = Terminal(process, ours)
    try:
        yield terminal
    finally:
        if process.poll() is None:
            terminal.press("\x03")
            terminal.await_end()
        os.close(ours)


def _control_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
