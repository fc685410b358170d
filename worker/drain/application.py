"""Messages on their way through one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final
from uuid import UUID

from producers.contract.cursors import Cursor, microseconds
from producers.contract.values import Uuid7
from worker.db.repository import Repository, UnknownOrganization
from worker.rules import decide_in_parts
from worker.snapshot import AuthorizedMessage, Outcome

PART_SIZE: Final = 25
"""Messages of a group that are saved while the next ones are decided."""


class Application:
    """Messages of one organization in one transaction: its steps are look up, decide and wait.

    After an error, the transaction is to be abandoned (`Repository.abandon`).
    """

    def __init__(
        self,
        repository: Repository,
        organization_id: UUID,
        messages: Sequence[AuthorizedMessage],
        new_id: Uuid7,
    ) -> None:
        self._repository, self._organization_id = repository, organization_id
        self._messages, self._new_id = messages, new_id
        self._begin()

    def _begin(self) -> None:
        self._transaction = self._repository.begin(self._organization_id)
        self._load = self._transaction.look_up(self._messages)

    def decide(self) -> tuple[Sequence[Outcome], Cursor]:
        """Decide and save, and send the commit; return outcomes, of the first messages.

        The second value is the place of the organization's last change event. PostgreSQL saves one
        part while the next one is decided.
        """
        try:
            snapshot = self._load()
        except UnknownOrganization:
            self._transaction.roll_back()
            self._repository.add(self._organization_id)
            self._begin()
            snapshot = self._load()
        now, outcomes = self._transaction.now, list[Outcome]()
        for part in decide_in_parts(
            self._organization_id,
            self._messages,
            snapshot,
            now=now,
            new_id=partial(self._new_id, microseconds(now)),
            size=PART_SIZE,
        ):
            outcomes += part.outcomes
            self._transaction.save(part.change_set)
        self._transaction.commit()
        return outcomes, snapshot.head

    def wait(self) -> None:
        """Wait until the commit has succeeded."""
        self._transaction.wait()


def apply_in_transaction(
    repository: Repository,
    organization_id: UUID,
    messages: Sequence[AuthorizedMessage],
    new_id: Uuid7,
) -> tuple[Sequence[Outcome], Cursor]:
    """Look up, decide and save in one transaction, without anything else in between."""
    try:
        application = Application(repository, organization_id, messages, new_id)
        decided = application.decide()
        application.wait()
        return decided
    except BaseException:
        repository.abandon()
        raise
