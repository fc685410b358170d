"""The names of an organization's Redis keys and pub/sub channels.

The braces are part of the names. What each of them holds is in docs/concepts/inbox-protocol.md.
"""

from __future__ import annotations

from uuid import UUID


def inbox_key(organization_id: UUID) -> str:
    """Return the key of the stream of messages that are accepted and not yet applied."""
    return f"task-tags:{{{organization_id}}}:inbox"


def lease_key(organization_id: UUID) -> str:
    """Return the key that says whether a drain of the inbox is queued or running."""
    return f"task-tags:{{{organization_id}}}:lease"


def dead_letters_key(organization_id: UUID) -> str:
    """Return the key of the stream of messages that are kept for an operator."""
    return f"task-tags:{{{organization_id}}}:rejected"


def failing_key(organization_id: UUID) -> str:
    """Return the key that counts the failures of the message at the head of the inbox."""
    return f"task-tags:{{{organization_id}}}:failing"


def position_key(organization_id: UUID) -> str:
    """Return the key that has the cursor of the organization's last change event."""
    return f"task-tags:{{{organization_id}}}:position"


def positions_channel(organization_id: UUID) -> str:
    """Return the channel on which each transaction that made change events is announced."""
    return f"task-tags:{{{organization_id}}}:positions"


def results_channel(organization_id: UUID, reply_to: str) -> str:
    """Return the channel on which the results of messages with this `reply_to` are published."""
    return f"task-tags:{{{organization_id}}}:results:{reply_to}"


def changes_channel(organization_id: UUID, flow_execution_id: UUID) -> str:
    """Return the channel on which the change events of a flow execution are published."""
    return f"task-tags:{{{organization_id}}}:changes:{flow_execution_id}"
