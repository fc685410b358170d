"""A beat that sends ten messages a second: `celery -A tests.support.quick_beat beat`."""

from __future__ import annotations

from worker.broker import WAKE_TASK
from worker.celery import app

app.conf.beat_schedule = {"wake": {"task": WAKE_TASK, "schedule": 0.1}}

__all__ = ["app"]
