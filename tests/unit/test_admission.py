"""Admission: what becomes of a stream entry, without a server."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr

from producers.contract.messages import TagBatch, add, register_execution, set_task_state
from producers.contract.results import ResultRecord
from producers.inbox.protocol import StreamEntry
from worker.auth import EXECUTIONS_WRITE, READ, SCOPES, WRITE, Authorizer, sign_token
from worker.drain.admission import Admission, Admitted, Refused, Unreadable, admit, fail_admission
from worker.settings import Settings

ORGANIZATION = uuid4()
NOW = datetime.now(timezone.utc)
SETTINGS = Settings.model_construct(jwt_secret=SecretStr("a secret of at least thirty-two bytes"))
BATCH = TagBatch(tags=[add(uuid4(), "task", "type", "tag")], reply_to="here")
REGISTRATION = register_execution(uuid4())
WRONG = json.dumps({**json.loads(BATCH.encode()), "tags": []}).encode()


def signed(*scopes: str, organization: UUID = ORGANIZATION, minutes: float = 60) -> str:
    return sign_token(
        SETTINGS,
        organization_id=organization,
        actor="ada",
        scopes=scopes or SCOPES,
        lifetime=timedelta(minutes=minutes),
    )


def admitted(message: bytes, token: str, age: timedelta = timedelta(0)) -> Admission:
    now = datetime.now(timezone.utc)
    accepted = int((now - age).timestamp() * 1000)
    entry = StreamEntry(b"%d-0" % accepted, message, token.encode())
    return admit(entry, ORGANIZATION, Authorizer(SETTINGS), now)


def refusal(answer: Refused) -> Any:
    error = ResultRecord.decode(answer.record).error
    assert error is not None
    return error.code


def test_a_message_is_admitted_with_the_actor_of_its_token() -> None:
    """Its digest is that of the message, by which it is known again."""
    found = admitted(BATCH.encode(), signed())
    assert isinstance(found, Admitted)
    assert (found.message.actor, found.message.digest) == ("ada", BATCH.digest())
    assert found.reply_to == "here"


@pytest.mark.parametrize(
    ("message", "token", "code"),
    [
        (BATCH.encode(), "", "unauthorized"),
        (BATCH.encode(), signed(minutes=-2), "unauthorized"),
        (BATCH.encode(), signed(organization=uuid4()), "forbidden"),
        (BATCH.encode(), signed(READ, EXECUTIONS_WRITE), "forbidden"),
        (REGISTRATION.encode(), signed(READ, WRITE), "forbidden"),
        (WRONG, signed(), "bad_request"),
        (WRONG, "", "unauthorized"),
        (WRONG, signed(organization=uuid4()), "forbidden"),
    ],
)
def test_a_message_is_refused_for_its_token_before_anything_else(
    message: bytes, token: str, code: str
) -> None:
    """Who may not write learns nothing of what is wrong with a message."""
    found = admitted(message, token)
    assert isinstance(found, Refused)
    assert refusal(found) == code


def test_a_scope_is_needed_for_each_kind_alone() -> None:
    """Tags need one scope, executions and states of tasks the other."""
    assert isinstance(admitted(BATCH.encode(), signed(WRITE)), Admitted)
    assert isinstance(admitted(REGISTRATION.encode(), signed(EXECUTIONS_WRITE)), Admitted)


def test_a_state_that_clears_tags_needs_both_scopes() -> None:
    """It removes tags, as a batch does; without `clear` one is enough."""
    plain = set_task_state(uuid4(), "task", "running")
    clearing = set_task_state(uuid4(), "task", "running", clear=["status"])
    assert isinstance(admitted(plain.encode(), signed(EXECUTIONS_WRITE)), Admitted)
    assert isinstance(admitted(clearing.encode(), signed(EXECUTIONS_WRITE)), Refused)
    assert isinstance(admitted(clearing.encode(), signed(WRITE)), Refused)
    assert isinstance(admitted(clearing.encode(), signed(EXECUTIONS_WRITE, WRITE)), Admitted)


def test_a_token_that_expired_while_its_message_waited_is_taken() -> None:
    """It counts when the message was accepted, not when a worker comes to it."""
    expired = signed(minutes=-30)
    assert isinstance(admitted(BATCH.encode(), expired, timedelta(minutes=31)), Admitted)
    assert isinstance(admitted(BATCH.encode(), expired), Refused)


def test_a_message_without_a_batch_id_is_kept_and_not_answered() -> None:
    """Nobody can be answered, so an operator gets it."""
    for token in (signed(), ""):
        found = admitted(b"{}", token)
        assert isinstance(found, Unreadable)
        assert found.answer is None
        assert found.dead_letter.message == b"{}"


def test_a_fault_of_the_worker_is_answered_if_the_message_can_be_read() -> None:
    """The message is kept as well."""
    entry = StreamEntry(b"1-0", BATCH.encode(), b"")
    found = fail_admission(entry, ORGANIZATION, RuntimeError(), NOW)
    assert found.answer is not None
    assert refusal(found.answer) == "internal_error"
    assert found.dead_letter.batch_id == BATCH.batch_id
    unread = fail_admission(StreamEntry(b"1-0", b"{}", b""), ORGANIZATION, RuntimeError(), NOW)
    assert unread.answer is None
