"""What is compared, by the names that stand in results and reports."""

from __future__ import annotations

from typing import Final

OURS: Final = "task tags"
CELERY: Final = "Celery"
RIVAL: Final = "grouping stream"
NAIVE: Final = "FastAPI + ORM"
PLAIN: Final = "FastAPI + psycopg"
PGBENCH: Final = "pgbench"
LIMIT: Final = "COPY (limit)"
