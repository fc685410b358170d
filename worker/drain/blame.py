"""Decides whether a message or a server caused a transaction to fail.

A message is to blame for what our own code finds in it, and for a statement that keeps failing
while a witness succeeds: a transaction of the same organization, on a new connection and rolled
back, that runs every statement with harmless values. Failures of begin and commit have no witness.
Whatever is no message's fault is waited out, so that nothing is refused for a server's fault.
"""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
from redis.exceptions import RedisError, ResponseError

from producers.contract.errors import ErrorInfo
from producers.contract.messages import (
    Message,
    TagBatch,
    add,
    register_execution,
    remove,
    set_task_state,
    when,
)
from producers.contract.values import uuid7
from producers.inbox.protocol import Inbox, StreamEntry
from worker.db.repository import Repository, Transaction
from worker.jwk_set import JwksUnavailable
from worker.log import log_limited
from worker.rules import decide, error_record
from worker.snapshot import AuthorizedMessage, ChangeSet, NewBatch, Outcome

MIN_ATTEMPTS: Final = 5
MIN_SECONDS: Final = 10.0
_OWN_ATTEMPTS: Final = 2
_CONNECTION_CLASSES: Final = ("08", "40", "53", "57", "58")
_STATE_CODES: Final = ("25006", "25P03", "25P04", "55P03")
_TIMEOUTS: Final = ("25P04", "57014")
_TIMEOUT_SECONDS: Final = 600.0
"""A server may be slow for so long, and a witness is quick all the same."""
_REMEDIES: Final = {
    "42": "run task-tags-admin migrate",
    "53": "give the server more disk space, memory or connections",
    "25006": "the server is read-only: the URL must lead to the primary server",
    "ReadOnlyError": "the server is a replica: TASK_TAGS_REDIS_URL must lead to the primary server",
    "NoPermissionError": "give the user its rights (docker/redis-users.acl)",
    "OutOfMemoryError": "raise the server's maxmemory",
    "AuthenticationError": "correct the credentials in TASK_TAGS_REDIS_URL",
    "BusyLoadingError": "wait until the server has loaded its data",
}
"""By SQLSTATE, its class, or the name of redis-py's exception."""
_UNREACHABLE: Final = "check that the URL leads to the server, and that the server runs"


def is_server_fault(error: Exception) -> bool:
    """Whether an error comes from a server or from the way to it, and says nothing of a message."""
    if isinstance(error, psycopg.Error):
        state = error.sqlstate
        if state is None:
            return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        return state.startswith(_CONNECTION_CLASSES) or state in _STATE_CODES
    return isinstance(error, (RedisError, OSError, JwksUnavailable))


def is_timeout(error: Exception, repository: Repository) -> bool:
    """Whether it is a server's fault that may yet be a message's, if a witness succeeds for long.

    No other is: a witness also succeeds on a disk that is nearly full, or at a locked row's side.
    After the worker's own limit the connection is lost, unless the server answers in 2 s.
    """
    if not isinstance(error, psycopg.Error):
        return False
    return error.sqlstate in _TIMEOUTS or (error.sqlstate is None and repository.was_too_long)


def is_locked_out(error: Exception, repository: Repository) -> bool:
    """Whether another worker has the organization: its row is locked."""
    return isinstance(error, psycopg.errors.LockNotAvailable) and not repository.failed_statement


def attempts_to_blame(
    error: Exception, entry: StreamEntry, inbox: Inbox, repository: Repository, organization: UUID
) -> int:
    """Return how often a message has failed, if it is to blame for it; 0 if it is not.

    The message failed alone, and not for the first time.

    It is for an exception of our own code, and for the failure of a statement after 5 of them in
    10 s or more (10 min for a time-out), each followed by a witness that succeeded.
    """
    is_slow, statement = is_timeout(error, repository), repository.failed_statement
    if is_server_fault(error) and not is_slow:
        return 0
    if not isinstance(error, psycopg.Error) or (error.sqlstate is None and not is_slow):
        return _OWN_ATTEMPTS
    if statement is None or not witness(repository, organization):
        return 0
    name = f"{error.sqlstate or ''} {type(error).__name__}".strip()
    attempts, seconds = inbox.count_failure(entry, name, "_slow" if is_slow else "")
    least = _TIMEOUT_SECONDS if is_slow else MIN_SECONDS
    return attempts if attempts >= MIN_ATTEMPTS and seconds >= least else 0


def witness(repository: Repository, organization_id: UUID) -> bool:
    """Run every statement of a drain with harmless values; return whether it succeeded."""
    execution = uuid4()
    names = ["task", *(f"{number:0200}" for number in range(25))]  # so many are loaded apart
    rounds: tuple[tuple[Message, ...], ...] = (
        (
            register_execution(execution, names),
            set_task_state(execution, "task", "queued"),
            TagBatch(tags=[add(execution, "task", "type", "witness")]),
        ),
        (
            register_execution(execution, ["another task"]),
            set_task_state(execution, "task", "running"),
            TagBatch(
                tags=[remove(execution, "task", "type", "witness")],
                conditions=[when(execution, "task", "type")],
            ),
        ),
    )

    def run(transaction: Transaction) -> None:
        for messages in rounds:
            some = [AuthorizedMessage.of(each, "witness") for each in messages]
            snapshot, now = transaction.load(some), transaction.now
            transaction.save(
                decide(organization_id, some, snapshot, now=now, new_id=uuid7).change_set
            )
        transaction.check()
        raise _Undo

    fresh = repository.clone()
    try:
        fresh.transact(organization_id, run)
    except _Undo:
        return True
    except Exception as error:
        log_wait("a probe of the database failed as well", organization_id, error)
    finally:
        fresh.close()
    return False


class _Undo(Exception):
    """Rolls the witness back."""


def log_wait(what: str, organization_id: UUID, error: Exception) -> None:
    """Log an error that is waited out, once a minute for each kind, with its cause and a remedy."""
    log_limited(f"{what}; retrying", **described(organization_id, error))


def described(organization_id: UUID, error: Exception) -> dict[str, Any]:
    """Return the log fields of an error: of its text the first line, which quotes no row."""
    cause = str(error).partition("\n")[0][:200]
    name, state = type(error).__name__, getattr(error, "sqlstate", None)
    fields = {"organization": str(organization_id), "error": name, "cause": cause}
    if state:
        fields["sqlstate"] = state
    if state or is_server_fault(error):
        has_answered = state or isinstance(error, ResponseError) or _is_refusal(cause)
        usual = "see the server's log" if has_answered else _UNREACHABLE
        fields["remedy"] = _REMEDIES.get(state or name) or _REMEDIES.get((state or "")[:2], usual)
    return fields


def _is_refusal(cause: str) -> bool:
    """Whether a server's answer to a connection is quoted."""
    return "FATAL:" in cause or "max number of clients" in cause


def decide_failure(
    organization_id: UUID, authorized: AuthorizedMessage, text: str
) -> tuple[Outcome, ChangeSet]:
    """Decide that a message ends in `internal_error` and is never applied under its batch id.

    The error must be stored: another drain may have a copy of the message, and would otherwise
    apply it after the batches behind it.
    """
    batch_id = authorized.message.batch_id
    error = ErrorInfo(code="internal_error", message=text, details=[])
    record = error_record(organization_id, batch_id, error).encode()
    batch = NewBatch(batch_id, authorized.digest, record, {})
    return Outcome(record), ChangeSet(batches=[batch])
