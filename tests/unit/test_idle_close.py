"""A connection that was refused is closed once its client stops sending."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.support.waiting import eventually
from worker.api import limits
from worker.api.limits import IdleClose


class Transport:
    closed_at: float | None = None

    def close(self) -> None:
        self.closed_at = time.monotonic()


def test_what_a_refused_client_still_sends_costs_no_timers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One waits at a time, however often something comes; each made others wait for 0.2 s."""
    monkeypatch.setattr(limits, "IDLE_SECONDS", 0.05)

    async def main() -> tuple[float, Transport]:
        loop: Any = asyncio.get_running_loop()
        transport: Any = Transport()
        closing = IdleClose(transport)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            for _ in range(100):
                closing.received()
            assert len(loop._scheduled) <= 2  # and the sleep
            await asyncio.sleep(0.01)
        assert transport.closed_at is None
        await asyncio.to_thread(eventually, lambda: transport.closed_at)
        return end, transport

    end, transport = asyncio.run(main())
    assert transport.closed_at is not None
    assert transport.closed_at >= end
