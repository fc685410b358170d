"""The command `task-tags-admin`: local stack, demo, migrations, tokens, endpoint, dead letters.

Exit codes: 0 done; 1 the demonstration found a difference; 2 wrong input or settings; 3 something
could not be started or reached; 6 standard output can't be written; 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from uuid import UUID

import psycopg
import typer
from redis import Redis, RedisError
from sqlalchemy.exc import DBAPIError

from producers.console import (
    OUTPUT_FAILED,
    AsJson,
    OutputFailed,
    escape_terminal,
    fail,
    open_streams,
    out,
    print_error,
    show,
    version_option,
    within,
)
from producers.contract.messages import Message, TagBatch, add, register_execution
from producers.errors import BatchRefused, ConfigurationError, TaskTagsError
from producers.inbox.protocol import Inbox
from producers.redis_client import open_redis
from worker import log
from worker.auth import SCOPES, Authorizer, is_actor, sign_token
from worker.db.repository import Repository
from worker.drain import dead_letters
from worker.jwk_set import JwksUnavailable
from worker.local.supervisor import StartupError, Stopped
from worker.settings import load_settings

if TYPE_CHECKING:  # commands import what they need
    from worker.local.stack import Stack

app = typer.Typer(
    help="Run and administer task tags.",
    epilog="Exit codes: 0 done; 1 the demonstration found a difference; 2 wrong input or settings; "
    "3 something could not be started or reached; 6 standard output can't be written; "
    "130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

rejected_app = typer.Typer(
    help="List, retry and drop dead letters: messages that failed in the worker or can't be read.",
    no_args_is_help=True,
)
app.add_typer(rejected_app, name="rejected")
inbox_app = typer.Typer(help="Repair an organization's inbox.", no_args_is_help=True)
app.add_typer(inbox_app, name="inbox")

app.callback()(version_option)

DataDir = Annotated[Path, typer.Option(help="The directory for data, logs and secrets.")]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="The endpoint's port; 0 chooses a free one.")
]
Workers = Annotated[int, typer.Option(min=1, max=64, help="The number of worker processes.")]


SAMPLE_EXECUTION: Final = UUID("01970000-0000-7000-8000-00000000e001")
"""The execution of the sample messages, and of what `up` prints; `demo` makes a new one."""


def main() -> None:
    open_streams()
    try:
        app()
    except ConfigurationError as error:
        fail(2, error)
    except DBAPIError as error:
        fail(3, error.orig)
    except RedisError as error:
        fail(3, f"Redis can't be used (TASK_TAGS_REDIS_URL): {error}")
    except OSError as error:
        fail(3, f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
    except BatchRefused as error:
        fail(1, f"a batch of the demonstration was refused: {error}")
    except (StartupError, psycopg.Error, TaskTagsError, JwksUnavailable) as error:
        fail(3, error)
    except OutputFailed as error:
        fail(OUTPUT_FAILED, error)


def say(line: str) -> None:
    print(f"  {line}", flush=True)


@contextmanager
def _stack(data_dir: Path, port: int, workers: int) -> Iterator[Stack]:
    """Run the stack until the block ends. Exit with 130 after Ctrl-C, 0 after another signal."""
    from worker.local.stack import run_stack

    print(f"task tags: starting on {data_dir}", flush=True)
    # A server whose URL the user has set is used, and none is started.
    given = load_settings().model_dump(include={"database_url", "redis_url"}, exclude_unset=True)
    urls = {f"external_{name}": url.get_secret_value() for name, url in given.items()}
    try:
        with run_stack(data_dir, port=port, workers=workers, say=say, **urls) as stack:
            yield stack
    except Stopped as stopped:
        sys.exit(130 if str(stopped) == signal.SIGINT.name else 0)


@app.command()
def up(data_dir: DataDir = Path(".task-tags"), port: Port = 8080, workers: Workers = 1) -> None:
    """Start PostgreSQL, Valkey, a worker, beat and the endpoint, and run them until Ctrl-C.

    If TASK_TAGS_DATABASE_URL or TASK_TAGS_REDIS_URL leads to another server, that is used instead.
    """
    with _stack(data_dir, port, workers) as stack:
        stack.supervisor.wait(say)
        _tell(stack, SAMPLE_EXECUTION, "review", register_execution(SAMPLE_EXECUTION))
        stack.supervisor.watch(say)


@app.command()
def demo(
    file: Annotated[
        Path,
        typer.Argument(help="NAME.jsonl with the messages; NAME.expected.jsonl has the results."),
    ] = Path("examples/document-review.jsonl"),
    data_dir: DataDir = Path(".task-tags"),
    port: Port = 8080,
    workers: Workers = 1,
    stay: Annotated[bool, typer.Option("--stay", help="Keep running until Ctrl-C.")] = False,
) -> None:
    """Start the stack, send a sample flow through the queue, and print results and changes."""
    from worker.local.demo import Demo

    sample = Demo.load(file)
    with _stack(data_dir, port, workers) as stack:
        report = sample.run(stack.redis_url, stack.endpoint_url, stack.organization_id, stack.token)
        for difference in report.differences:
            print(f"different: {difference}")
        stack.supervisor.wait(say)
        if stay:
            print(report.summary)
            _tell(stack, report.execution, report.task_name)
            stack.supervisor.watch(say)
    print(report.summary, flush=True)
    sys.exit(1 if report.differences else 0)


def _password(option: typer.CallbackParam, value: str | None) -> str | None:
    if value and not (value.strip() and value.isprintable() and len(value) <= 1000):
        fail(2, f"{option.envvar}: must have 1 to 1000 printable characters")
    return value


def _password_option(role: str) -> Any:
    variable = f"TASK_TAGS_{role.upper()}_PASSWORD"
    return typer.Option(envvar=variable, callback=_password, help=f"For the role task_tags_{role}.")


@app.command(name="migrate")
def migrate_command(
    worker_password: Annotated[str | None, _password_option("worker")] = None,
    endpoint_password: Annotated[str | None, _password_option("endpoint")] = None,
) -> None:
    """Create or update tables and roles. TASK_TAGS_DATABASE_URL names the owner of the tables."""
    from worker.db.migrate import migrate
    from worker.db.tables import ROLES

    given = zip(ROLES, (worker_password, endpoint_password), strict=True)
    passwords = {role: password for role, password in given if password}
    migrate(load_settings().database_url.get_secret_value(), passwords)
    print("the database is up to date")


def _actor(value: str) -> str:
    if not is_actor(value):
        raise typer.BadParameter(
            "must have 1 to 200 characters, no control or bidirectional ones, and not begin with "
            "task-tags:"
        )
    return value


@app.command()
def token(
    org: Annotated[
        UUID | None, typer.Option(help="The organization's id; by default the local stack's.")
    ] = None,
    sub: Annotated[
        str,
        typer.Option(
            callback=_actor,
            help="The actor: at most 200 characters, no control or bidirectional ones.",
        ),
    ] = "developer",
    scope: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(SCOPES)}; all by default.")
    ] = None,
    days: Annotated[
        float, typer.Option(callback=within(0, 36500), help="Days until it expires; at most 36500.")
    ] = 1,
    data_dir: DataDir = Path(".task-tags"),
) -> None:
    """Sign a token for development, with TASK_TAGS_JWT_SECRET or the local stack's secret."""
    scopes = tuple(word for each in scope or SCOPES for word in each.split())
    if unknown := set(scopes) - set(SCOPES):
        fail(2, f"there is no scope {', '.join(sorted(unknown))}: choose from {', '.join(SCOPES)}")
    settings, lifetime = load_settings(), timedelta(days=days)
    has_key = settings.jwt_secret or settings.jwt_public_key or settings.jwt_jwks_url
    if not has_key and (data_dir / "secrets.json").exists():
        from worker.local.stack import DEVELOPMENT_ORGANIZATION, signing_settings

        settings, org = signing_settings(data_dir), org or DEVELOPMENT_ORGANIZATION
    if org is None:
        fail(2, f"--org is missing, and there is no local stack in {data_dir} (--data-dir)")
    print(sign_token(settings, organization_id=org, actor=sub, scopes=scopes, lifetime=lifetime))


def _host(value: str) -> str:
    try:
        value.encode("idna")
    except UnicodeError:
        raise typer.BadParameter("is not the name of a host") from None
    return value


@app.command()
def endpoint(
    host: Annotated[
        str, typer.Option(callback=_host, help="The address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8080,
) -> None:
    """Serve the endpoint: reading, watching, writing, and the live page."""
    from worker.api.app import serve

    settings = load_settings()
    log.configure(settings.log_level)
    serve(settings, host, port)


@app.command()
def openapi() -> None:
    """Print the OpenAPI document of the endpoint. It does not depend on settings."""
    from worker.api.app import openapi_document

    print(json.dumps(openapi_document(), indent=2))


# --- Dead letters --------------------------------------------------------------------------------

Org = Annotated[UUID, typer.Option(help="The organization's id.")]
Ids = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="As `rejected list` prints them.")
]
All = Annotated[bool, typer.Option("--all", help="All current dead letters, the oldest first.")]


@rejected_app.command(name="list")
def list_rejected(
    org: Annotated[UUID | None, typer.Option(help="Only this organization's.")] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the oldest of each organization first.

    The columns are: organization, id, time, attempts, batch id, size in bytes, reason.
    """
    none = True
    with _redis() as redis:
        for organization_id in [org] if org else dead_letters.organizations(redis):
            for each in dead_letters.dead_letters(redis, organization_id):
                none = False
                summary = each.summary()
                # Not a table: it would truncate the ids, which users copy.
                cells = ("-" if value is None else str(value) for value in summary.values())
                show("  ".join(map(escape_terminal, cells)), [json.dumps(summary)], as_json)
    if none:
        show("no dead letters", [], as_json)


@rejected_app.command(name="show")
def show_rejected(
    id: Annotated[str, typer.Argument(help="As `rejected list` prints it.")],
    org: Org,
    as_json: AsJson = False,
) -> None:
    """Print one dead letter in full."""
    with _redis() as redis:
        try:
            rejected = dead_letters.find(redis, org, id)
        except dead_letters.DeadLetterNotFound as error:
            fail(2, error)
    fields = {**rejected.summary(), "message": rejected.text}
    lines = (
        f"{name:<15}  {'' if value is None else escape_terminal(str(value))}"
        for name, value in fields.items()
    )
    show("\n".join(lines), [json.dumps(fields)], as_json)


@rejected_app.command()
def retry(
    org: Org,
    ids: Ids = None,
    everything: All = False,
    token: Annotated[
        str,
        typer.Option(envvar="TASK_TAGS_TOKEN", help="Your token, with which they are enqueued."),
    ] = "",
) -> None:
    """Enqueue dead letters again, after their cause is fixed.

    Tokens are not kept, so the messages are enqueued under your token: you become the actor of what
    they change. They go to the end of the inbox, after everything that was enqueued since. The
    command needs the worker's settings. A message that the worker would refuse, or whose batch id
    can't be read, stays a dead letter (exit code 2).
    """
    from producers.client import TagProducer

    if not (token := token.strip()):
        fail(2, "TASK_TAGS_TOKEN is not set")
    settings = load_settings()
    redis_url = settings.redis_url.get_secret_value()
    with (
        open_redis(redis_url) as redis,
        closing(Repository(settings.database_url.get_secret_value())) as repository,
        TagProducer(redis_url=redis_url, organization_id=org, token=token) as producer,
    ):
        authorizer = Authorizer(settings)
        authorizer.fetch_keys()
        retrier = dead_letters.DeadLetterRetrier(
            redis, repository, authorizer, token, producer.send
        )

        def enqueue_again(entry: dead_letters.DeadLetterEntry) -> str:
            return f"enqueued again: {retrier.retry(entry, dead_letters.server_time(redis))}"

        _for_each(redis, org, ids, everything, enqueue_again)


@rejected_app.command()
def drop(org: Org, ids: Ids = None, everything: All = False) -> None:
    """Delete dead letters permanently."""
    with _redis() as redis:

        def forget(entry: dead_letters.DeadLetterEntry) -> str:
            dead_letters.drop(redis, entry)
            return "dropped"

        _for_each(redis, org, ids, everything, forget)


@inbox_app.command()
def rebuild(org: Org) -> None:
    """Move the messages of an inbox to a new stream, when the old one has reached its last id."""
    with _redis() as redis:
        out.print(f"{Inbox(redis, org).rebuild()} messages are in the new stream")


def _for_each(
    redis: Redis,
    org: UUID,
    ids: list[str] | None,
    everything: bool,
    do: Callable[[dead_letters.DeadLetterEntry], str],
) -> None:
    """Apply `do` to each dead letter and print what it returns; exit with 2 if it fails for one.

    Dead letters that are added meanwhile are left alone: a retry that fails again would never end.
    """
    if bool(ids) == everything:
        fail(2, "give either the ids of dead letters or --all")
    wrong = False
    for id in ids or [each.id for each in dead_letters.dead_letters(redis, org)]:
        try:
            out.print(f"{escape_terminal(id)}  {do(dead_letters.find(redis, org, id))}")
        except (dead_letters.DeadLetterNotFound, dead_letters.RetryRefused) as error:
            wrong = True
            print_error(f"{id}: {error}")
    if wrong:
        sys.exit(2)


def _redis() -> Redis:
    return open_redis(load_settings().redis_url.get_secret_value())


# --- Helpers -------------------------------------------------------------------------------------


def _tell(stack: Stack, execution: UUID, task_name: str, *first: Message) -> None:
    """Print how to look at an execution, and commands for another terminal that change it."""
    page = f"{stack.endpoint_url}/#execution={execution}&token={stack.token}"
    print(f"\n  live page  {page}\n  API        {stack.endpoint_url}/docs")
    print("\nTry in another terminal, and see it on the page:\n")
    scripts = Path(sys.executable).absolute().parent
    print(f'  export PATH={shlex.quote(str(scripts))}:"$PATH"')
    for name, value in stack.environment.items():
        print(f"  export {name}={shlex.quote(value)}")
    batch = TagBatch(tags=[add(execution, task_name, "review_status", "seen")])
    lines = " ".join(shlex.quote(each.encode().decode()) for each in (*first, batch))
    print(
        f"  printf '%s\\n' {lines} | task-tags enqueue - --wait\n  task-tags list {execution}\n"
        f"  task-tags-admin token --sub ada --data-dir {shlex.quote(str(stack.directory))}\n\n"
        "The last command prints a token of another actor.\n"
        "Ctrl-C stops everything; the data stays.",
        flush=True,
    )


if __name__ == "__main__":
    main()
