"""The processes of a contender: starts and stops them, and reads what they cost from /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.memory import max_resident, resident
from worker.local.supervisor import ProcessSpec, Supervisor

STOP_SECONDS = 6.0
SETTLE_SECONDS = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Workers:
    """The running worker processes of one contender."""

    def __init__(
        self, supervisor: Supervisor, commands: Sequence[list[str]], environment: Mapping[str, str]
    ) -> None:
        self._supervisor = supervisor
        self._children = [
            ProcessSpec(f"bench-{number}", argv, ready=lambda: True, environment=dict(environment))
            for number, argv in enumerate(commands)
        ]
        supervisor.start(*self._children)

    @property
    def running(self) -> list[subprocess.Popen[bytes]]:
        return [process for child, process in self._supervisor.running if child in self._children]

    def check(self) -> None:
        """Raise `RuntimeError` with the end of the log if one of them has ended."""
        if any(process.poll() is not None for process in self.running):
            raise RuntimeError(f"a worker has ended: {self.last_words()}")

    def last_words(self) -> str:
        lines: list[str] = []
        for child in self._children:
            lines += self._supervisor.log(child.name).read_text(errors="replace").splitlines()[-8:]
        return " | ".join(line.strip() for line in lines if line.strip())[-600:]

    def cpu_seconds(self) -> float:
        return cpu_seconds(process.pid for process in self.running)

    def settle(self) -> None:
        """Wait until all of them have started: until they do next to nothing for 0.2 s."""
        deadline, quiet, before = time.monotonic() + SETTLE_SECONDS, 0, self.cpu_seconds()
        while quiet < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            now = self.cpu_seconds()
            quiet = quiet + 1 if now - before <= 0.02 else 0
            before = now

    def forget_peak(self) -> None:
        """Reset the peak memory, where the system allows that."""
        for pid in tree(process.pid for process in self.running):
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak_memory_mb(self) -> float:
        """Return the sum of the peaks; memory that processes share is in each of them."""
        return sum(_peak(pid) for pid in tree(p.pid for p in self.running))

    def memory_mb(self) -> float:
        """Return the memory of the process that has most now."""
        return max(resident(process.pid) for process in self.running)

    def stop(self) -> None:
        entries = [each for each in self._supervisor.running if each[0] in self._children]
        for child, process in entries:
            if process.poll() is None:
                process.send_signal(child.stop_signal)
        deadline = time.monotonic() + STOP_SECONDS
        for entry in entries:
            with suppress(subprocess.TimeoutExpired):
                entry[1].wait(max(0.05, deadline - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(entry[1].pid, signal.SIGKILL)  # each is the leader of a session
            entry[1].wait()
            self._supervisor.running.remove(entry)


def server_pids(supervisor: Supervisor) -> list[int]:
    """Return the processes of PostgreSQL and Valkey."""
    names = ("postgresql", "valkey")
    return [process.pid for child, process in supervisor.running if child.name in names]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time of processes, of their descendants and of those that have ended."""
    ticks = 0
    for pid in tree(pids):
        with suppress(OSError):
            ticks += sum(int(field) for field in _stat(pid)[11:15])
    return ticks / _TICKS


def tree(pids: Iterable[int]) -> set[int]:
    """Return processes and all their descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                children.setdefault(int(_stat(int(path.name))[1]), []).append(int(path.name))
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of a process from its state on (proc(5): field 3)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _peak(pid: int) -> float:
    with suppress(OSError, IndexError):  # it may have ended
        return max_resident(pid)
    return 0.0
