"""Logs as JSON, one entry per line. Values from messages and requests are fields, not text."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Final

from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger(__name__)


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
    # uvicorn's has the query of each WebSocket, in which a client may have put its token.
    for chatty in (
        *("celery.worker.strategy", "celery.app.trace", "celery.beat", "httpx", "kombu"),
        "uvicorn.error",
    ):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


_LOG_SECONDS: Final = 60.0
_MAX_KINDS: Final = 10_000
_logged: dict[tuple[str, ...], float] = {}


def log_limited(message: str, **fields: Any) -> None:
    """Log a warning once a minute for each message, organization and kind of error."""
    kind = (message, str(fields.get("organization")), str(fields.get("error")))
    now = time.monotonic()
    if now - _logged.get(kind, -_LOG_SECONDS) >= _LOG_SECONDS:
        if len(_logged) > _MAX_KINDS:
            _logged.clear()
        _logged[kind] = now
        logger.warning(message, extra=fields)
