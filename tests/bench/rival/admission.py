"""Reads a message and checks its token: frozen, see tests/bench/rival/__init__.py."""

from __future__ import annotations

import time
from typing import NamedTuple
from uuid import UUID

from producers.contract.errors import ErrorCode, ErrorInfo
from tests.bench.rival.messages import InvalidMessage, digest, parse_canonical
from tests.bench.rival.rules import error_record
from tests.bench.rival.snapshot import AuthorizedMessage
from worker.auth import LEEWAY_SECONDS, READ, WRITE, Authorizer, InvalidToken, Principal


class Refused(NamedTuple):
    """The message is answered with an error and has no effect."""

    reply_to: str
    record: bytes


class Admission:
    """Admits messages; a token that was verified is remembered."""

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer
        self._verified: dict[bytes, Principal] = {}

    def admit(
        self, organization_id: UUID, raw: bytes, token: bytes
    ) -> AuthorizedMessage | Refused | None:
        """Return what to apply, a refusal, or None if nobody can be answered."""
        try:
            message, canonical = parse_canonical(raw)
        except InvalidMessage as error:
            if error.batch_id is None:
                return None
            text = "the message breaks the contract"
            return _refuse(organization_id, error.batch_id, None, "bad_request", text)
        ids = organization_id, message.batch_id, message.reply_to
        try:
            principal = self._verify(token)
        except InvalidToken as error:
            return _refuse(*ids, "unauthorized", str(error))
        if principal.organization_id != organization_id or not principal.allows(WRITE):
            return _refuse(*ids, "forbidden", "the token does not allow it")
        return AuthorizedMessage(
            message, principal.actor, digest(canonical), may_read=principal.allows(READ)
        )

    def _verify(self, token: bytes) -> Principal:
        now = time.time()
        known = self._verified.get(token)
        if known is None or now > known.expires_at + LEEWAY_SECONDS:
            known = self._verified[token] = self._authorizer.verify(token, now)
        return known


def _refuse(
    organization_id: UUID, batch_id: UUID, reply_to: str | None, code: ErrorCode, text: str
) -> Refused:
    error = ErrorInfo(code=code, message=text, details=[])
    record = error_record(organization_id, batch_id, error).encode()
    return Refused(reply_to or str(batch_id), record)
