"""The command `task-tags-admin`: local stack, demo, migrations, tokens, endpoint, dead letters.

Exit codes: 0 done; 1 the demonstration found a difference; 2 wrong input or settings; 3 something
could not be started or reached; 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn
from uuid import UUID

import psycopg
import typer
from pydantic import SecretStr
from redis import RedisError
from sqlalchemy.exc import DBAPIError

from producers.errors import ConfigurationError, InboxFull, Unavailable
from worker import log
from worker.auth import SCOPES, Authorizer, JwksUnavailable, sign_token
from worker.local.supervisor import StartupError, Stopped
from worker.settings import Settings, load_settings

if TYPE_CHECKING:  # commands import what they need; the endpoint needs no Celery
    from redis import Redis

    from worker.drain.dead_letters import DeadLetterEntry, DeadLetterRetrier
    from worker.local.stack import Stack

app = typer.Typer(
    help="Run and administer task tags.",
    epilog="Exit codes: 0 done; 1 the demonstration found a difference; 2 wrong input or settings; "
    "3 something could not be started or reached; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

rejected_app = typer.Typer(
    help="List, retry and drop dead letters: messages at which the worker failed, or that can't be "
    "read.",
    no_args_is_help=True,
)
app.add_typer(rejected_app, name="rejected")

DataDir = Annotated[
    Path, typer.Option(help="The directory for data, logs and secrets.", show_default=True)
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="The endpoint's port; 0 takes a free one.")
]
Workers = Annotated[int, typer.Option(min=1, max=64, help="The number of worker processes.")]


SAMPLE_EXECUTION: Final = UUID("01970000-0000-7000-8000-00000000e001")
"""The execution of the sample messages; `demo` replaces it with a new one."""


def main() -> None:
    try:
        app()
    except (StartupError, psycopg.Error) as error:
        fail(3, str(error))
    except DBAPIError as error:
        fail(3, str(error.orig))
    except (InboxFull, Unavailable, JwksUnavailable) as error:
        fail(3, str(error))
    except RedisError as error:
        fail(3, f"Redis can't be used: {error}")
    except ConfigurationError as error:
        fail(2, str(error))
    except OSError as error:
        fail(3, f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))


def fail(code: int, message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def say(line: str) -> None:
    print(f"  {line}", flush=True)


@contextmanager
def _stack(data_dir: Path, port: int, workers: int) -> Iterator[Stack]:
    """Run the stack until the block ends. Exit with 130 after Ctrl-C, 0 after another signal."""
    from worker.local.stack import run_stack

    settings = load_settings()
    try:
        with run_stack(
            data_dir,
            port=port,
            workers=workers,
            say=say,
            external_database_url=_if_set(settings, "database_url"),
            external_redis_url=_if_set(settings, "redis_url"),
        ) as stack:
            yield stack
    except Stopped as stopped:
        sys.exit(130 if str(stopped) == signal.SIGINT.name else 0)


def _if_set(settings: Settings, name: str) -> str | None:
    """Return a URL if the user has set it. Such a server is used, and none is started."""
    url: SecretStr = getattr(settings, name)
    return url.get_secret_value() if name in settings.model_fields_set else None


@app.command()
def up(data_dir: DataDir = Path(".task-tags"), port: Port = 8080, workers: Workers = 1) -> None:
    """Start PostgreSQL, Valkey, a worker, beat and the endpoint, and run them until Ctrl-C."""
    print(f"task tags: starting on {data_dir}", flush=True)
    with _stack(data_dir, port, workers) as stack:
        _tell(stack)
        stack.supervisor.watch(say)


@app.command()
def demo(
    file: Annotated[
        Path,
        typer.Argument(help="NAME.jsonl has the messages, NAME.expected.jsonl the results."),
    ] = Path("examples/document-review.jsonl"),
    data_dir: DataDir = Path(".task-tags"),
    port: Port = 8080,
    workers: Workers = 1,
    stay: Annotated[bool, typer.Option("--stay", help="Keep running until Ctrl-C.")] = False,
) -> None:
    """Start the stack, send a sample flow through the queue, and print results and changes."""
    from worker.local.demo import Demo

    sample = Demo.load(file)
    print(f"task tags: starting on {data_dir}", flush=True)
    with _stack(data_dir, port, workers) as stack:
        report = sample.run(stack.redis_url, stack.endpoint_url, stack.organization_id, stack.token)
        for difference in report.differences:
            print(f"different: {difference}")
        if stay:
            print(report.summary)
            _tell(stack, report.execution)
            stack.supervisor.watch(say)
    print(report.summary, flush=True)
    sys.exit(1 if report.differences else 0)


@app.command(name="migrate")
def migrate_command(
    worker_password: Annotated[
        str | None,
        typer.Option(envvar="TASK_TAGS_WORKER_PASSWORD", help="For the role task_tags_worker."),
    ] = None,
    endpoint_password: Annotated[
        str | None,
        typer.Option(envvar="TASK_TAGS_ENDPOINT_PASSWORD", help="For the role task_tags_endpoint."),
    ] = None,
) -> None:
    """Create or update tables and roles. TASK_TAGS_DATABASE_URL names the owner of the tables."""
    from worker.db.migrate import migrate
    from worker.db.tables import ROLES

    passwords = dict(zip(ROLES, (worker_password, endpoint_password), strict=True))
    migrate(
        load_settings().database_url.get_secret_value(),
        {role: password for role, password in passwords.items() if password},
    )
    print("the database is up to date")


@app.command()
def token(
    org: Annotated[UUID, typer.Option(help="The organization's id.")],
    sub: Annotated[str, typer.Option(help="The actor.")] = "developer",
    scope: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(SCOPES)}; all by default.")
    ] = None,
    days: Annotated[float, typer.Option(min=0, max=36500, help="Days until it expires.")] = 1,
) -> None:
    """Sign a token with TASK_TAGS_JWT_SECRET, for development."""
    scopes = tuple(word for each in scope or SCOPES for word in each.split())
    if unknown := set(scopes) - set(SCOPES):
        fail(2, f"there is no scope {', '.join(sorted(unknown))}: choose from {', '.join(SCOPES)}")
    print(
        sign_token(
            load_settings(),
            organization_id=org,
            actor=sub,
            scopes=scopes,
            lifetime=timedelta(days=days),
        )
    )


@app.command()
def endpoint(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
) -> None:
    """Serve the endpoint: reading, watching, writing, and the live page."""
    from worker.api.app import serve

    settings = load_settings()
    log.configure(settings.log_level)
    serve(settings, host, port)


@app.command()
def openapi() -> None:
    """Print the OpenAPI document of the endpoint. It does not depend on settings."""
    from worker.api.app import create_app

    settings = Settings.model_construct(jwt_secret=SecretStr("-" * 32))  # reads no environment
    print(json.dumps(create_app(settings).openapi(), indent=2))


# --- Dead letters --------------------------------------------------------------------------------

Org = Annotated[UUID, typer.Option(help="The organization's id.")]
Ids = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="As `rejected list` prints them.")
]
All = Annotated[bool, typer.Option("--all", help="All current dead letters, the oldest first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


@rejected_app.command(name="list")
def list_rejected(
    org: Annotated[UUID | None, typer.Option(help="Only this organization's.")] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the oldest of each organization first.

    A line has: organization, id, time, attempts, batch id, size in bytes, reason.
    """
    from producers.cli import out
    from worker.drain.dead_letters import dead_letters, organizations

    with _redis() as redis:
        for organization_id in [org] if org else organizations(redis):
            for each in dead_letters(redis, organization_id):
                summary = each.summary()
                if as_json:
                    print(json.dumps(summary))
                else:
                    out.print(_rejected_line(summary))


@rejected_app.command()
def show(
    id: Annotated[str, typer.Argument(help="As `rejected list` prints it.")],
    org: Org,
    as_json: AsJson = False,
) -> None:
    """Print one dead letter in full."""
    from producers.cli import escape_terminal, out
    from worker.drain.dead_letters import DeadLetterNotFound, find

    with _redis() as redis:
        try:
            rejected = find(redis, org, id)
        except DeadLetterNotFound as error:
            fail(2, str(error))
    fields = {**rejected.summary(), "message": rejected.text}
    if as_json:
        print(json.dumps(fields))
    else:
        for name, value in fields.items():
            out.print(f"{name:<15}  {'' if value is None else escape_terminal(str(value))}")


@rejected_app.command()
def retry(
    org: Org,
    ids: Ids = None,
    everything: All = False,
    token: Annotated[
        str,
        typer.Option(envvar="TASK_TAGS_TOKEN", help="Your token, under which they are enqueued."),
    ] = "",
) -> None:
    """Enqueue dead letters again, after their cause is fixed.

    Tokens are not kept, so the messages are enqueued under your token: you become the actor of what
    they change. They go to the end of the inbox, behind everything that was enqueued since. The
    command needs the worker's settings. A message that the worker would refuse, or whose batch id
    can't be read, stays a dead letter (exit code 2).
    """
    from worker.drain.dead_letters import server_time

    if not token:
        fail(2, "TASK_TAGS_TOKEN is not set")
    with _redis() as redis, _operator(redis, org, token) as operator:

        def enqueue_again(rejected: DeadLetterEntry) -> str:
            return f"enqueued again: {operator.retry(rejected, server_time(redis))}"

        _for_each(redis, org, ids, everything, enqueue_again)


@rejected_app.command()
def drop(org: Org, ids: Ids = None, everything: All = False) -> None:
    """Delete dead letters permanently."""
    from worker.drain import dead_letters

    with _redis() as redis:

        def forget(message: DeadLetterEntry) -> str:
            dead_letters.drop(redis, message)
            return "dropped"

        _for_each(redis, org, ids, everything, forget)


def _for_each(
    redis: Redis,
    org: UUID,
    ids: list[str] | None,
    everything: bool,
    do: Callable[[DeadLetterEntry], str],
) -> None:
    """Apply `do` to each dead letter and print what it returns; exit with 2 if it fails for one.

    Dead letters that are added meanwhile are left alone: a retry that fails again would never end.
    """
    from producers.cli import err, escape_terminal, out
    from worker.drain.dead_letters import DeadLetterNotFound, RetryRefused, dead_letters, find

    if bool(ids) == everything:
        fail(2, "give either the ids of dead letters or --all")
    wrong = False
    for id in ids or [each.id for each in dead_letters(redis, org)]:
        try:
            out.print(f"{escape_terminal(id)}  {do(find(redis, org, id))}")
        except (DeadLetterNotFound, RetryRefused) as error:
            wrong = True
            err.print(f"[bold red]error:[/] {escape_terminal(id)}: {escape_terminal(str(error))}")
    if wrong:
        sys.exit(2)


@contextmanager
def _redis() -> Iterator[Redis]:
    from producers.redis_client import open_redis

    with open_redis(load_settings().redis_url.get_secret_value()) as redis:
        yield redis


@contextmanager
def _operator(redis: Redis, org: UUID, token: str) -> Iterator[DeadLetterRetrier]:
    from producers.client import TagProducer
    from worker.db.repository import Repository
    from worker.drain.dead_letters import DeadLetterRetrier

    settings = load_settings()
    authorizer = Authorizer(settings)
    redis_url = settings.redis_url.get_secret_value()
    repository = Repository(settings.database_url.get_secret_value())
    with TagProducer(redis_url=redis_url, organization_id=org, token=token) as producer:
        try:
            yield DeadLetterRetrier(redis, repository, authorizer, token, producer.send)
        finally:
            repository.close()


def _rejected_line(summary: dict[str, Any]) -> str:
    """Return one line of Rich markup: a table would truncate the ids, which users copy."""
    from producers.cli import escape_terminal

    return "  ".join(
        escape_terminal("-" if each is None else str(each)) for each in summary.values()
    )


# --- Helpers -------------------------------------------------------------------------------------


def _tell(stack: Stack, execution: UUID = SAMPLE_EXECUTION) -> None:
    """Print how to look at an execution, and how to use the stack from another terminal."""
    exports: dict[str, Any] = stack.environment
    page = f"{stack.endpoint_url}/#execution={execution}&token={stack.token}"
    print(f"\n  live page  {page}\n  API        {stack.endpoint_url}/docs")
    print("\nTry in another terminal, and see it on the page:\n")
    for name, value in exports.items():
        print(f"  export {name}={shlex.quote(value)}")
    command = (
        "task-tags enqueue --unchecked examples/document-review.jsonl && "
        f"task-tags list {SAMPLE_EXECUTION}"
    )
    print(f"  {command}\n\nCtrl-C stops everything; the data stays.", flush=True)


if __name__ == "__main__":
    main()
