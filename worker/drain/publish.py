"""What goes to pub/sub: names the channels of outcomes (design, section 4). Sending it is the inbox's part."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from producers.contract.channels import changes_channel, results_channel
from worker.rules import Outcome


def publications(
    organization_id: UUID, reply_to: str, outcome: Outcome
) -> Iterator[tuple[str, bytes]]:
    """Yield channel and payload: the change events first, so that a result never runs ahead of them."""
    for flow_execution_id, event in outcome.events:
        yield changes_channel(organization_id, flow_execution_id), event
    yield results_channel(organization_id, reply_to), outcome.record
