"""The route that reads tasks: the work list of an organization, and the tasks of an execution.

What it returns is in docs/concepts/contract.md#rule-14.
"""

from __future__ import annotations

from typing import Annotated, Any, Final
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError, from_json, to_json

from producers.contract.errors import ErrorDetail
from producers.contract.messages import TaskState
from producers.contract.results import Tag
from producers.contract.selectors import Selector
from producers.contract.values import FlowId, Id, TaskName
from worker.api.auth import Reading
from worker.api.errors import UNKNOWN_EXECUTION, wrong_parameter
from worker.api.page_statements import BEFORE_ALL, MAX_TAGS
from worker.api.page_tokens import OF_NAMES, OF_TAGS, PageToken, page_token, place_of
from worker.api.params import NoQuery, Number, TagsQuery, query
from worker.api.responses import READ_PROBLEMS, Database
from worker.db.pg_arrays import texts

MAX_SELECTORS: Final = 10
_PATH: Final = "/task-executions"

router = APIRouter(responses=READ_PROBLEMS)


# --- The parameters ------------------------------------------------------------------------------


def _selector(text: str) -> Selector:
    try:
        return Selector.parse(text)
    except ValueError:
        raise PydanticCustomError("selector", "must be a selector") from None


Selectors = list[Annotated[str, AfterValidator(_selector)]]


class WorkQuery(NoQuery):
    with_: Selectors = Field(
        [],
        alias="with",
        max_length=MAX_SELECTORS,
        description="Only tasks that have such a tag: `<type>:<tag>`, or `<type>` for any tag of "
        "the type; in the type, `\\:` is a colon and `\\\\` a backslash. The first one has a tag, "
        "and the tasks that have had it longest come first.",
    )
    without: Selectors = Field(
        [],
        max_length=MAX_SELECTORS,
        description="Only tasks that have no such tag. At most 10 together with `with`.",
    )
    flow_execution_id: Id | None = Field(
        None, description="Only tasks of this flow execution; required without `with`."
    )
    task_name: TaskName | None = Field(None, description="Only tasks of this name.")
    state: list[TaskState] = Field([], max_length=7, description="Only tasks in these states.")
    flow_id: FlowId | None = Field(None, description="Only tasks of executions of this flow.")
    limit: Number = Field(
        100, ge=1, le=1000, description="The most tasks in a page, which ends at about 1 MiB."
    )
    page: PageToken = None

    @property
    def statement(self) -> bytes:
        """The name of the statement that reads a page of them."""
        if not self.with_:
            return b"tasks"
        if self.flow_execution_id is None:
            return b"work"
        return b"work_of_execution" if self.task_name is None else b"work_of_task"

    def parameters(self, after: str | None) -> list[bytes | None]:
        """Return the parameters of the statement, in the binary format."""
        selectors: Any = [*self.with_, *self.without]  # their validator makes selectors
        first, _, second = (after or (BEFORE_ALL if self.with_ else "0 ")).partition(" ")
        return [
            None if self.flow_execution_id is None else self.flow_execution_id.bytes,
            None if self.task_name is None else self.task_name.encode(),
            texts([selector.tag_type for selector in selectors]),
            texts([selector.tag for selector in selectors]),
            len(self.with_).to_bytes(8),
            texts(self.state) if self.state else None,
            None if self.flow_id is None else self.flow_id.encode(),
            first.encode(),
            second.encode(),
            self.limit.to_bytes(8),
        ]


def _check(query: WorkQuery) -> None:
    """Raise `ApiError` for what is wrong with several parameters together."""
    detail = None
    if len(query.with_) + len(query.without) > MAX_SELECTORS:
        detail = ErrorDetail(field="with", message="has too many values, together with without")
    elif query.with_ and query.with_[0].tag is None:  # type: ignore[attr-defined]
        detail = ErrorDetail(field="with", message="the first must be type:tag")
    elif not query.with_ and query.flow_execution_id is None:
        detail = ErrorDetail(field="flow_execution_id", message="is required without with")
    if detail is not None:
        raise wrong_parameter([detail])


# --- The answer ----------------------------------------------------------------------------------


class TaskAnswer(BaseModel):
    """A task: its last recorded state, if it has one, and its active tags.

    These are the oldest 100; if it has more, `tags_next` is the URL of the next ones, or else null.
    `waiting_since` is when it got the tag that the first `with` names, or null without `with`.
    """

    flow_id: str | None
    flow_execution_id: UUID
    task_name: str
    state: TaskState | None
    state_changed_at: str | None
    state_changed_by: str | None
    tags: list[Tag]
    waiting_since: str | None
    tags_next: str | None


class TasksAnswer(BaseModel):
    """A page of tasks; `next_page` asks for the next one, and is null if there is none.

    `cursor` is the organization's last change event: the page has its changes, and none after it.
    """

    task_executions: list[TaskAnswer]
    cursor: str
    next_page: str | None


@router.get(
    _PATH,
    summary="Read a work list, or the tasks of a flow execution, with their states and tags",
    response_model=TasksAnswer,
    response_description="With `with`, the tasks that have waited longest come first. Without it, "
    "the tasks of the execution: registered names in their order, then others that have an active "
    "tag or a state, by name. A page may be short, or empty, and have a next one.",
)
async def read_tasks(
    caller: Reading, query: Annotated[WorkQuery, Depends(query(WorkQuery))], reader: Database
) -> Response:
    _check(query)
    about: Any = (caller.organization_id, _PATH, query)
    after = place_of(query.page, OF_TAGS if query.with_ else OF_NAMES, *about)
    found = await reader.tasks(caller.organization_id, query.statement, query.parameters(after))
    if found is None:
        raise UNKNOWN_EXECUTION
    tasks = b",".join(
        b'%b,"tags_next":%b}'
        % (task[:-1], to_json(_tags_url(caller.organization_id, task, after.decode())))
        for task, after in zip(found.tasks, found.tags_after, strict=True)
    )
    next_page = None if found.after is None else page_token(found.after, *about)
    cursor = to_json(str(found.head))
    body = b'{"task_executions":[%b],"cursor":%b,"next_page":%b}'
    return Response(
        body % (tasks, cursor, to_json(next_page)),
        headers={"Cache-Control": "private, no-cache"},
        media_type="application/json",
    )


def _tags_url(organization_id: UUID, task: bytes, after: str) -> str | None:
    """Return the URL of the tags of a task that are not shown with it; None if there are none."""
    if not after:
        return None
    names = ("flow_execution_id", "task_name")
    values = {name: value for name, value in from_json(task).items() if name in names}
    token = page_token(after, organization_id, "/task-tags", TagsQuery.model_validate(values))
    return f"/task-tags?{urlencode({**values, 'limit': MAX_TAGS, 'page': token})}"
