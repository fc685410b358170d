"""Runs a few child processes: starts them, waits until they are ready, restarts and stops them.

It does not know what they are. On Linux, they end with this process, even if it is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 12.0
_QUICK_EXIT_SECONDS: Final = 5.0
_MAX_DELAY_SECONDS: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StartupError(Exception):
    """Something could not be started. The text is one line for the user."""


class Stopped(BaseException):
    """A signal asked this process to end. `except Exception` does not catch it."""


@dataclass
class ProcessSpec:
    """A process: how to start it, how to check that it is ready, and which signal stops it."""

    name: str
    argv: list[str]
    ready: Callable[[], bool]
    stop_signal: signal.Signals = signal.SIGTERM
    environment: dict[str, str] = field(default_factory=dict)
    popen: dict[str, Any] = field(default_factory=dict)


class Supervisor:
    """Runs children until its block ends. Use it as a context manager, in the main thread."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self.afterwards: list[Callable[[], None]] = []
        """Called when all children have ended."""
        self.running: list[tuple[ProcessSpec, subprocess.Popen[bytes]]] = []
        self._waiting: list[ProcessSpec] = []
        self._quick_exits: dict[str, int] = {}
        self._restart_at: dict[int, float] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> Supervisor:
        self._handlers = {
            number: signal.signal(number, _raise_stopped)
            for number in _SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN  # as nohup sets it: it stays ignored
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        while self.running:
            self._stop(*self.running.pop())
        for clean_up in self.afterwards:
            clean_up()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def start(self, *children: ProcessSpec, say: Callable[[str], None] = lambda _: None) -> None:
        """Start children side by side, and wait until they are ready. Raises `StartupError`."""
        self.spawn(*children)
        self.wait(say)

    def spawn(self, *children: ProcessSpec) -> None:
        """Start children without waiting for them; `wait` does that."""
        for child in children:
            self.log(child.name).unlink(missing_ok=True)
            self.running.append((child, self._spawn(child)))
            self._waiting.append(child)

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until all children are ready, and say of each how long it took.

        Raises:
            StartupError: A child ended, or was not ready within a minute. It quotes the last line
                of the child's log.
        """
        while self._waiting:
            for child in self._waiting[:]:
                seconds = time.monotonic() - self._started[child.name]
                if child.ready():
                    self._waiting.remove(child)
                    say(f"{child.name:<11} ready in {seconds:.1f} s")
                elif seconds > START_SECONDS:
                    raise self._failure(child, "is not ready")
            for child, process in self.running:
                if child in self._waiting and process.poll() is not None:
                    raise self._failure(child, f"ended with {process.returncode}")
            time.sleep(0.02)

    def watch(self, say: Callable[[str], None]) -> None:
        """Restart children that end, until a signal raises `Stopped`."""
        while True:
            self.restart_ended(say)
            time.sleep(0.2)

    def restart_ended(self, say: Callable[[str], None]) -> None:
        """Restart the children that have ended; one that keeps ending waits, up to 30 s.

        It never ends the others: they may be the databases, and what ends it may pass.
        """
        now = time.monotonic()
        for place, (child, process) in enumerate(self.running):
            if process.poll() is None:
                continue
            if process.pid not in self._restart_at:
                quick = now - self._started[child.name] < _QUICK_EXIT_SECONDS
                exits = self._quick_exits.get(child.name, 0) + 1 if quick else 0
                self._quick_exits[child.name] = exits
                delay = min(2.0 ** (exits - 2), _MAX_DELAY_SECONDS) if exits > 2 else 0.0
                self._restart_at[process.pid] = now + delay
                when = f" in {delay:g} s" if delay else ""
                say(f"{child.name} ended with {process.returncode}: starting it again{when}")
            if now >= self._restart_at[process.pid]:
                try:
                    self.running[place] = child, self._spawn(child)
                    del self._restart_at[process.pid]
                except (OSError, subprocess.SubprocessError) as error:
                    self._restart_at[process.pid] = now + _MAX_DELAY_SECONDS
                    say(f"{child.name} can't be started, trying again in 30 s: {error}")

    def _spawn(self, child: ProcessSpec) -> subprocess.Popen[bytes]:
        self._started[child.name] = time.monotonic()
        with self.log(child.name).open("ab") as log:
            return subprocess.Popen(
                child.argv,
                env={**os.environ, **child.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,  # so that Ctrl-C reaches this process only
                preexec_fn=_end_with_parent(child.stop_signal),
                **child.popen,
            )

    def _stop(self, child: ProcessSpec, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(child.stop_signal)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _failure(self, child: ProcessSpec, what: str) -> StartupError:
        log = self.log(child.name)
        *_, last = log.read_text(errors="replace").strip().splitlines() or ["its log is empty"]
        with suppress(ValueError, LookupError, TypeError):  # else it is no JSON
            last = json.loads(last)["message"]
        return StartupError(f"{child.name} {what}: {last} (see {log})")


def _raise_stopped(number: int, _: object) -> None:
    raise Stopped(signal.Signals(number).name)


def _end_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """Return a function for the child that makes Linux send it a signal when this process dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, number)
