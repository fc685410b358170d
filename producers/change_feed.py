"""The changes of an execution without a gap: what is published, and from the endpoint what was not heard of it.

Nothing that is published says how much was missed, but revisions count 1, 2, 3 … So an event that is the next one is
passed on, one that was passed on before is dropped, and for any other the endpoint is asked; also whenever the
subscription begins anew, and now and then while all is quiet, for the last event may be the one that was lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final
from uuid import UUID

import httpx
from pydantic import TypeAdapter, ValidationError

from producers.contract.messages import ChangeEvent
from producers.errors import ChangesRefused, RevisionExpired, Unavailable

logger = logging.getLogger(__name__)

IDLE_SECONDS: Final = 15.0
"""After so long without an event the endpoint is asked whether there is one."""
_RETRY_SECONDS: Final = 1.0
_PAGE: Final = 100
_EVENTS: Final = TypeAdapter(list[ChangeEvent])

Fetch = Callable[[int], Sequence[ChangeEvent]]
"""Returns stored events after a revision, in order; none if there are no more. Raises `Unavailable`."""


class GapFiller:
    """Puts events in order. `after` is the revision of the last one that was passed on."""

    def __init__(self, fetch: Fetch, after: int) -> None:
        self.after = after
        self._fetch = fetch
        self._reached = False
        self._look_at = 0.0

    def on_subscribed(self) -> Iterator[ChangeEvent]:
        """The subscription has begun, for the first time or again: yield what was stored before."""
        yield from self._catch_up()

    def on_event(self, event: ChangeEvent) -> Iterator[ChangeEvent]:
        """Yield what a published event makes known: itself, nothing if it is an old one, or all up to it."""
        if event.revision == self.after + 1:
            yield self._passed(event)
        elif event.revision > self.after:
            yield from self._catch_up()

    def on_idle(self) -> Iterator[ChangeEvent]:
        """Nothing was heard for a moment: yield what was missed, if it is time to look."""
        if time.monotonic() >= self._look_at:
            yield from self._catch_up()

    def _catch_up(self) -> Iterator[ChangeEvent]:
        try:
            while events := self._fetch(self.after):
                for event in events:
                    yield self._passed(event)
        except Unavailable as error:
            if not self._reached:
                raise
            logger.warning("changes can't be read, and will be: %s", error)
            self._look_at = time.monotonic() + _RETRY_SECONDS
        else:
            self._reached = True
            self._look_at = time.monotonic() + IDLE_SECONDS

    def _passed(self, event: ChangeEvent) -> ChangeEvent:
        self.after = event.revision
        self._look_at = time.monotonic() + IDLE_SECONDS
        return event


def endpoint(url: str, token: str) -> httpx.Client:
    """Return a client of the endpoint. One on this machine is not asked through a proxy."""
    return httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {token}"},
        timeout=10,
        trust_env=httpx.URL(url).host not in ("localhost", "127.0.0.1", "::1"),
    )


def fetch_from(client: httpx.Client, flow_execution_id: UUID) -> Fetch:
    """Return what fetches an execution's events from the endpoint.

    Raises `RevisionExpired` and `ChangesRefused`, which asking again does not help.
    """

    def fetch(after: int) -> Sequence[ChangeEvent]:
        query: dict[str, str | int] = {
            "flow_execution_id": str(flow_execution_id),
            "after": after,
            "limit": _PAGE,
        }
        try:
            answer = client.get("/task-tags/changes", params=query)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Unavailable(f"the endpoint can't be used: {type(error).__name__}") from error
        if answer.status_code == 200:
            try:
                return _EVENTS.validate_json(answer.content)
            except ValidationError:
                raise Unavailable("the endpoint's answer is not one of changes") from None
        if answer.status_code == 410:
            raise RevisionExpired(error_summary(answer))
        if answer.status_code >= 500:
            raise Unavailable(f"the endpoint can't be used: {error_summary(answer)}")
        raise ChangesRefused(error_summary(answer))

    return fetch


def error_summary(answer: httpx.Response) -> str:
    """Return what an error of the endpoint says, in one line."""
    try:
        error = answer.json()["error"]
        details = "; ".join(f"{each['field']}: {each['message']}" for each in error["details"])
        return f"{error['message']}{f' ({details})' if details else ''}"
    except (ValueError, LookupError, TypeError):
        return f"the endpoint answered {answer.status_code}"
