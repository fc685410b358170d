"""The command `task-tags-admin`: the local stack, the demonstration, migrations, tokens, the endpoint.

Exit codes: 0 done; 1 the demonstration found a difference; 2 wrong input or settings; 3 something could not be
started or reached; 130 interrupted.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from uuid import UUID

import typer
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError

from worker import log
from worker.authorize import SCOPES, mint
from worker.settings import InvalidSettings, Settings, load_settings
from worker.supervisor import Failed, Stopped

if TYPE_CHECKING:  # a command loads what it needs: the endpoint's process has no use for Celery
    from worker.stack import Stack

app = typer.Typer(
    help="Run and look after task tags.",
    epilog="Exit codes: 0 done; 1 the demonstration found a difference; 2 wrong input or settings; 3 something "
    "could not be started or reached; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DataDir = Annotated[
    Path, typer.Option(help="Where the stack keeps its data, logs and secrets.", show_default=True)
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="The endpoint's port; 0 takes a free one.")
]
Workers = Annotated[int, typer.Option(min=1, max=64, help="How many worker processes.")]


def main() -> None:
    try:
        app()
    except (Failed, DBAPIError) as error:
        fail(3, str(error.orig) if isinstance(error, DBAPIError) else str(error))
    except InvalidSettings as error:
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
    """Run the stack; a signal that ends it is no error (130 tells that of Ctrl-C)."""
    from worker.stack import running

    settings = load_settings()
    try:
        with running(
            data_dir,
            port=port,
            workers=workers,
            say=say,
            own_database_url=_if_set(settings, "database_url"),
            own_redis_url=_if_set(settings, "redis_url"),
        ) as stack:
            yield stack
    except Stopped as stopped:
        sys.exit(130 if str(stopped) == signal.SIGINT.name else 0)


def _if_set(settings: Settings, name: str) -> str | None:
    """Return a URL that the user has set; servers of one's own are not started but used."""
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
        Path, typer.Argument(help="Messages in JSON Lines; the expected results beside it.")
    ] = Path("examples/document-review.jsonl"),
    data_dir: DataDir = Path(".task-tags"),
    port: Port = 8080,
    workers: Workers = 1,
    stay: Annotated[bool, typer.Option("--stay", help="Go on until Ctrl-C.")] = False,
) -> None:
    """Start the stack, send a sample flow through the queue, and show what becomes of it."""
    from worker.demo import Demo

    sample = Demo.load(file)
    print(f"task tags: starting on {data_dir}", flush=True)
    with _stack(data_dir, port, workers) as stack:
        report = sample.run(stack.redis_url, stack.endpoint_url, stack.organization_id, stack.token)
        for difference in report.differences:
            print(f"different: {difference}")
        if stay:
            print(report.summary)
            _tell(stack)
            stack.supervisor.watch(say)
    print(report.summary, flush=True)
    sys.exit(1 if report.differences else 0)


@app.command(name="migrate")
def migrate_command(
    worker_password: Annotated[
        str | None, typer.Option(envvar="TASK_TAGS_WORKER_PASSWORD", help="For task_tags_worker.")
    ] = None,
    endpoint_password: Annotated[
        str | None,
        typer.Option(envvar="TASK_TAGS_ENDPOINT_PASSWORD", help="For task_tags_endpoint."),
    ] = None,
) -> None:
    """Bring TASK_TAGS_DATABASE_URL, as the tables' owner, to the current tables and roles."""
    from worker.migrate import ROLES, migrate

    passwords = dict(zip(ROLES, (worker_password, endpoint_password), strict=True))
    migrate(
        load_settings().database_url.get_secret_value(),
        {role: password for role, password in passwords.items() if password},
    )
    print("the database is up to date")


@app.command()
def token(
    org: Annotated[UUID, typer.Option(help="The organization.")],
    sub: Annotated[str, typer.Option(help="The actor.")] = "developer",
    scope: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(SCOPES)}; all by default.")
    ] = None,
    days: Annotated[float, typer.Option(min=0, max=36500, help="How long it is valid.")] = 1,
) -> None:
    """Sign a token with TASK_TAGS_JWT_SECRET, for development."""
    scopes = tuple(word for each in scope or SCOPES for word in each.split())
    if unknown := set(scopes) - set(SCOPES):
        fail(2, f"there is no scope {', '.join(sorted(unknown))}: choose from {', '.join(SCOPES)}")
    print(
        mint(
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
    """Serve the read endpoint."""
    import uvicorn

    from worker.endpoint import create_app
    from worker.http import LimitedProtocol

    settings = load_settings()
    log.configure(settings.log_level)
    uvicorn.run(
        create_app(settings),
        host=host,
        port=port,
        loop="uvloop",
        http=LimitedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )


def _tell(stack: Stack) -> None:
    """Print how to use the stack from another terminal."""
    exports: dict[str, Any] = stack.environment
    print(f"\n  endpoint  {stack.endpoint_url}/docs\n\nTry in another terminal:\n")
    for name, value in exports.items():
        print(f"  export {name}={shlex.quote(value)}")
    command = (
        "task-tags enqueue --unchecked examples/document-review.jsonl && "
        "task-tags list 01970000-0000-7000-8000-00000000e001"
    )
    print(f"  {command}\n\nCtrl-C stops everything; the data stays.", flush=True)


if __name__ == "__main__":
    main()
