"""Logs as JSON, one entry per line. Values from outside are fields, never part of the text."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.json import JsonFormatter


def configure(level: str) -> None:
    """Send this process's logs to standard error.

    Args:
        level: The name of a level of the standard library, such as INFO.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("celery.worker.strategy", "celery.app.trace", "celery.beat", "httpx", "kombu"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
