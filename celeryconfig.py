"""Celery settings only, shared by workers and beat. The broker's URL is a setting of the process.

A drain message may be lost, because messages are kept in the inbox: so nothing is acknowledged,
kept or restored.
"""

import time
from datetime import UTC, datetime

from celery.schedules import crontab, schedule
from kombu.entity import Queue

task_default_queue = "task-tags"
task_queues = (Queue("task-tags", no_ack=True),)
task_create_missing_queues = False
task_ignore_result = True
result_backend = None
task_serializer = "json"
accept_content = ["json"]

worker_pool = "solo"
worker_hijack_root_logger = False
worker_detect_quorum_queues = False
worker_cancel_long_running_tasks_on_connection_loss = False

broker_connection_retry_on_startup = True
broker_connection_max_retries = None
# An answer such as READONLY or NOPERM is waited out like a lost connection.
broker_channel_error_retry = True
broker_transport_options = {
    "socket_timeout": 10,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "priority_steps": [0],
}
task_publish_retry_policy = {
    "max_retries": 2,
    "interval_start": 0,
    "interval_step": 0.2,
    "interval_max": 0.5,
}

timezone = "UTC"
beat_scheduler = (
    "celery.beat:Scheduler"  # keeps no file: neither entry needs to know when it last ran
)
_start = time.time() - time.monotonic()


def _steady_now() -> datetime:
    """Return the time by a clock that nobody sets: a step of the system's clock delays no entry."""
    return datetime.fromtimestamp(_start + time.monotonic(), UTC)


# No message expires: that would compare the clocks of two machines.
beat_schedule = {
    "wake": {"task": "task_tags.wake", "schedule": schedule(5.0, nowfun=_steady_now)},
    "purge": {"task": "task_tags.purge", "schedule": crontab(minute=17, nowfun=_steady_now)},
}
