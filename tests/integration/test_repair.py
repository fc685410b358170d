"""Keys that somebody else has set: no lease holds an inbox for ever, no wrong type blocks it."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from typer.testing import CliRunner

from producers.client import TagProducer
from producers.contract.channels import dead_letters_key, failing_key, inbox_key, lease_key
from producers.errors import Unavailable
from producers.inbox.protocol import Inbox
from producers.inbox.rescue import rescue_some
from tests.support.tenant import Tenant, tagging
from worker.cli import app


@pytest.mark.parametrize("milliseconds", [None, 61_000, 600_000])
@pytest.mark.parametrize("value", ["running somebody", "queued somebody", "junk", ""])
def test_a_lease_that_nobody_frees_is_free(
    tenant: Tenant, value: str, milliseconds: int | None
) -> None:
    """Without a time to live, or with more than 60 s left: for a drain and for an append."""
    key = lease_key(tenant.organization)
    tenant.redis.set(key, value, px=milliseconds)
    tenant.send(tagging("a"))
    assert tenant.redis.get(key) == b"queued lease"
    tenant.redis.set(key, value, px=milliseconds)
    tenant.drain()
    assert tenant.tags() == ["a"]


def test_a_lease_that_another_run_holds_is_kept(tenant: Tenant) -> None:
    """One that will expire belongs to its holder."""
    tenant.redis.set(lease_key(tenant.organization), "running another", px=60_000)
    tenant.send(tagging("a"))
    assert tenant.drain() == 0


def test_keys_of_a_wrong_type_are_mended(tenant: Tenant, caplog: pytest.LogCaptureFixture) -> None:
    """A lease or count is deleted; a key that may hold messages is renamed, and that is logged."""
    organization, redis = tenant.organization, tenant.redis
    for key in (lease_key(organization), inbox_key(organization), dead_letters_key(organization)):
        redis.delete(key)
        redis.rpush(key, "x")
    redis.set(failing_key(organization), "x")
    tenant.send(tagging("a"), b"no message")
    tenant.drain()
    assert tenant.tags() == ["a"]
    assert redis.xlen(dead_letters_key(organization)) == 1
    aside = [key.decode() for key in redis.scan_iter(f"*{organization}*:aside:*")]
    assert sorted(key.split(":aside:")[0] for key in aside) == sorted(
        [inbox_key(organization), dead_letters_key(organization)]
    )
    assert len([each for each in caplog.records if each.levelname == "ERROR"]) >= 2


def test_a_key_that_another_process_repairs_first_is_no_error(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that met it go on, as they would have a moment later."""
    repair = Inbox.repair
    monkeypatch.setattr(Inbox, "repair", lambda inbox: (repair(inbox), repair(inbox))[1])
    tenant.redis.delete(inbox_key(tenant.organization))
    tenant.redis.set(inbox_key(tenant.organization), "x")
    assert tenant.inbox.append([tagging("a").encode()], tenant.token, "lease") == 1


def test_nothing_is_published_by_a_step_that_fails(tenant: Tenant) -> None:
    """A dead-letter stream of a wrong type: each result is published once all the same."""
    tenant.redis.set(dead_letters_key(tenant.organization), "x")
    tenant.send(tagging("a"), b"no message", tagging("b"))
    tenant.drain()
    assert tenant.outcomes() == [["added"], ["added"]]


def test_one_organizations_wrong_keys_do_not_keep_others_from_being_woken(
    tenant: Tenant, organization: UUID
) -> None:
    """The wake task mends them, and claims the others."""
    other = uuid4()
    Inbox(tenant.redis, other).append([tagging("x").encode()], tenant.token, "lease")
    tenant.redis.delete(lease_key(other), inbox_key(organization))
    tenant.redis.set(inbox_key(organization), "x")
    assert rescue_some(tenant.redis, sorted([organization, other]), 8_000) == [other]
    assert not tenant.redis.exists(inbox_key(organization))


def test_a_stream_that_has_reached_its_last_id_is_rebuilt(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Producers are told so; after `task-tags-admin inbox rebuild` all messages are applied."""
    redis, key = tenant.redis, inbox_key(tenant.organization)
    url = tenant.servers.stack.redis_url.replace("?db=0", "?db=1")
    monkeypatch.setenv("TASK_TAGS_REDIS_URL", url)
    producer = TagProducer(redis_url=url, organization_id=tenant.organization, token=tenant.token)
    tags = [f"{number}" for number in range(250)]
    tenant.send(*map(tagging, tags[:-1]))
    last = {"message": tagging(tags[-1]).encode(), "token": tenant.token}
    redis.xadd(key, last, id="18446744073709551615-18446744073709551615")
    with producer, pytest.raises(Unavailable, match="task-tags-admin inbox rebuild"):
        producer.enqueue(tagging("refused"))
    rebuilt = CliRunner().invoke(app, ["inbox", "rebuild", "--org", str(tenant.organization)])
    assert rebuilt.output == "250 messages are in the new stream\n"
    tenant.send(tagging("next"))
    tenant.drain()
    assert tenant.tags() == [*tags, "next"]
    empty = CliRunner().invoke(app, ["inbox", "rebuild", "--org", str(tenant.organization)])
    assert empty.output == "0 messages are in the new stream\n"
