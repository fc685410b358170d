"""The endpoint written for speed with the usual means: FastAPI, psycopg's pool, SQL, no ORM.

For comparison only, as tests/bench/naive.py. PostgreSQL makes the JSON. With psycopg's pipeline
mode, which saves two round trips, it is slower.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Final
from uuid import UUID

from fastapi import Depends, FastAPI, Header, HTTPException, Response
from psycopg_pool import AsyncConnectionPool

from tests.bench.naive import organization

SCOPE: Final = "select set_config('app.organization_id', %s, true)"
READ: Final = """
    select e.revision, case when e.revision::text = any(%(known)s) then null else (
           select coalesce(json_agg(row_to_json(t)), '[]')::text
             from (select id, flow_execution_id, task_name, tag_type, tag, tag_metadata,
                          organization_id, status, created_at, created_by, updated_at, modified_by
                     from task_tags
                    where organization_id = e.organization_id
                      and flow_execution_id = e.flow_execution_id and status = 'active'
                    order by created_at, id) t) end
      from flow_executions e
     where e.organization_id = %(organization_id)s
       and e.flow_execution_id = %(flow_execution_id)s
"""
POOL_SIZE: Final = 8


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    url = os.environ["TASK_TAGS_DATABASE_URL"]
    options = {"prepare_threshold": 0}
    async with AsyncConnectionPool(url, min_size=POOL_SIZE, kwargs=options, open=False) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/task-tags")
async def read_tags(
    flow_execution_id: UUID,
    organization_id: Annotated[UUID, Depends(organization)],
    if_none_match: Annotated[str, Header()] = "",
) -> Response:
    known = [each.strip(' "') for each in if_none_match.split(",")]
    values = {"organization_id": organization_id, "flow_execution_id": flow_execution_id}
    async with app.state.pool.connection() as connection:
        await connection.execute(SCOPE, [str(organization_id)])
        found = await connection.execute(READ, {**values, "known": known})
        row = await found.fetchone()
    if row is None:
        raise HTTPException(404, "there is no such flow execution")
    revision, tags = row
    headers = {"ETag": f'"{revision}"'}
    if tags is None:
        return Response(status_code=304, headers=headers)
    return Response(tags, headers=headers, media_type="application/json")
