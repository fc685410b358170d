"""Makes psycopg accept the parameters of worker/db/pg_arrays.py, to run a statement alone."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

from worker.db.pg_arrays import Parameter


def register(connection: psycopg.Connection[Any]) -> None:
    """Let a connection send them as they are."""
    for kind in Parameter.__subclasses__():

        class AsItIs(Dumper):
            format = Format.BINARY
            oid = kind.oid

            def dump(self, obj: Any) -> bytes:
                return bytes(obj)

        connection.adapters.register_dumper(kind, AsItIs)
