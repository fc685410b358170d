"""Random ways through the model of the inbox protocol, on the real scripts: they always agree.

So the model, whose states tests/unit/test_inbox_model.py searches, is one of this code.
"""

from __future__ import annotations

import json
import random
from base64 import b64decode
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from uuid import UUID

import pytest

from producers.contract.channels import inbox_key, lease_key
from producers.inbox import script_calls
from producers.inbox.drain_message import QUEUE, drain_message
from producers.inbox.protocol import WAITING, Inbox, StreamEntry
from producers.inbox.script_calls import run_script
from tests.support.inbox_model import HAND, NEW, NO_BUGS, Faults, State, Step, steps

STEPS: Final = 10_000
MANY_FAULTS: Final = Faults(*[3] * len(Faults._fields))
RARE: Final = {
    *("crash", "expire", "lose", "deliver_again", "forget", "junk", "requeue"),
    "requeue: a group is under way",
}


@dataclass
class Path:
    """An inbox on a server, and what the model says about it."""

    redis: Any
    organization: UUID
    state: State = field(default_factory=partial(State, MANY_FAULTS))
    published: list[bytes] = field(default_factory=list)
    ids: dict[int, bytes] = field(default_factory=dict)
    """The stream ids of messages."""
    last: int = 0
    taken: list[str] = field(default_factory=list)

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.redis, self.organization)

    def take(self, step: Step) -> None:
        """Do a step on the server, and follow it in the model."""
        before = self.state
        self.last += 1
        self.state = renamed(step.state, self.last)
        self.taken.append(step.name)
        match step.name:
            case "append":
                self.inbox.append([b"%d" % before.appended], "token", str(self.last))
                self.note_ids()
            case "append by an older one":
                self.append_as_older_ones_do(before)
            case "rescue" | "rebuild":
                run_script(self.redis, "rescue", *self.inbox.rescue_arguments(str(self.last)))
            case "acquire" | "acquire: refused" | "acquire: nothing there":
                self.redis.lrem(QUEUE, 1, self.message(step.actor))
                self.acquire(self.last)
            case "acquire again" | "acquire again: refused":
                self.acquire(step.actor)
            case "requeue" | "requeue: lease lost" | "requeue: a group is under way":
                self.inbox.requeue(str(step.actor))
            case "commit" | "crash":
                pass  # neither changes Redis
            case "expire":
                self.redis.delete(lease_key(self.organization))
            case "lose":
                self.redis.lrem(QUEUE, 1, self.message(step.actor))
            case "deliver_again":
                self.redis.lpush(QUEUE, self.message(step.actor))
            case "forget":
                self.redis.delete(WAITING)
            case "junk":
                self.redis.set(lease_key(self.organization), "running somebody")
            case _:
                self.ack_and_publish(before, step.actor)
        if self.state.lease is None or self.state.lease[0] != "junk":  # which any script deletes
            for run in self.state.runs:
                self.inbox.renew(str(run.id))  # which changes nothing that the model knows

    def append_as_older_ones_do(self, before: State) -> None:
        fields = {"message": b"%d" % before.appended, "token": "token"}
        self.redis.xadd(inbox_key(self.organization), fields)
        self.note_ids()
        if before.lease is None or before.lease[0] == "junk":
            lease = f"queued {self.last}"
            self.redis.set(lease_key(self.organization), lease, px=8_000)
            self.redis.lpush(QUEUE, drain_message(self.organization, str(self.last)))

    def note_ids(self) -> None:
        newest = self.redis.xrevrange(inbox_key(self.organization), count=1)
        for id, fields in newest:
            self.ids[int(fields[b"message"])] = id

    def acquire(self, run_id: int) -> None:
        acquired = self.inbox.acquire(str(run_id), max_messages=HAND)
        self.expect_read(run_id, (), acquired.entries)

    def ack_and_publish(self, before: State, run_id: int) -> None:
        (run,) = (run for run in before.runs if run.id == run_id)
        group, held = run.committed[0], run.held
        entries = [StreamEntry(self.ids[each], b"", b"") for each in group]
        publications = [(f"path:{self.organization}", b"%d" % each) for each in group]
        self.published += [payload for _, payload in publications]
        left = len(held) - len(group)
        following = self.inbox.ack_and_publish(
            str(run_id),
            entries,
            publications,
            max_messages=HAND - left,
            after=self.ids[held[-1]] if left else b"",
        ).following()
        self.expect_read(run_id, held[len(group) :], following)

    def expect_read(
        self, run_id: int, held: tuple[int, ...], following: list[StreamEntry] | None
    ) -> None:
        """Assert that the run has in its hands what it had, and what it has read now."""
        now = next((run for run in self.state.runs if run.id == run_id), None)
        if following is None:  # it ends what is on its way
            assert now is None or now.read == (), self.taken
            return
        read = tuple(int(entry.message or b"") for entry in following)
        assert (held + read) == (() if now is None else now.held), self.taken

    def message(self, lease_id: int) -> bytes:
        """Return a drain message in the queue that was sent with this lease."""
        messages: list[bytes] = self.redis.lrange(QUEUE, 0, -1)
        return next(each for each in messages if lease_id_of(each) == lease_id)

    def compare(self) -> None:
        """Assert that the server is in the model's state."""
        entries = self.redis.xrange(inbox_key(self.organization))
        assert tuple(int(each[b"message"]) for _, each in entries) == self.state.inbox, self.taken
        lease = self.redis.get(lease_key(self.organization))
        assert lease == self.expected_lease(), self.taken
        queue = sorted(map(lease_id_of, self.redis.lrange(QUEUE, 0, -1)))
        assert queue == sorted(self.state.queue), self.taken
        waiting = bool(self.redis.sismember(WAITING, str(self.organization)))
        assert waiting == self.state.waiting, self.taken

    def expected_lease(self) -> bytes | None:
        if self.state.lease is None:
            return None
        kind, id = self.state.lease
        return b"running somebody" if kind == "junk" else f"{kind} {id}".encode()


def lease_id_of(message: bytes) -> int:
    return int(json.loads(b64decode(json.loads(message)["body"]))[0][1])


def renamed(state: State, id: int) -> State:
    """Give the id that a step made its name."""

    def name(each: int) -> int:
        return id if each == NEW else each

    return state._replace(
        lease=state.lease and (state.lease[0], name(state.lease[1])),
        queue=tuple(map(name, state.queue)),
        runs=tuple(run._replace(id=name(run.id)) for run in state.runs),
    )


def walk(redis: Any, chance: random.Random, length: int) -> None:
    """Take a random way until no step is left; then begin with another organization."""
    taken = 0
    while taken < length:
        redis.flushdb()
        path = Path(redis, UUID(int=chance.getrandbits(128)))
        with redis.pubsub() as pubsub:
            pubsub.subscribe(f"path:{path.organization}")
            pubsub.get_message(timeout=1)
            while choices := list(steps(path.state, NO_BUGS)):
                weights = [0.2 if step.name in RARE else 1 for step in choices]
                path.take(chance.choices(choices, weights)[0])
                path.compare()
                taken += 1
            received = [pubsub.get_message(timeout=1) for _ in path.published]
        assert [each and each["data"] for each in received] == path.published


def test_the_scripts_do_what_the_model_says(quiet_redis: Any) -> None:
    """10,000 steps, with every fault: the same inbox, lease, queue, set and publications."""
    walk(quiet_redis, random.Random(20261126), STEPS)


@pytest.mark.parametrize(
    ("script", "right", "wrong"),
    [
        ("append", "if not held then", "if true then"),
        ("append", "if waiting == 0 then", "if waiting == 1 then"),
        ("append", "left < 0 or ", ""),
        ("acquire", "string.sub(held, 1, 7) ~= 'queued '", "true"),
        ("acquire", "if held and held ~= 'running ' .. ARGV[1] and", "if false and"),
        ("acquire", "redis.call('DEL', lease)", ""),
        ("acquire", "redis.call('SREM', WAITING", "redis.call('SISMEMBER', WAITING"),
        ("acquire", "redis.call('SADD', WAITING", "redis.call('SISMEMBER', WAITING"),
        ("ack_and_publish", "if held and held ~= 'running ' .. ARGV[1] then", "if false then"),
        ("ack_and_publish", "redis.call('XDEL', KEYS[1]", "redis.call('XLEN', KEYS[1]) -- "),
        ("ack_and_publish", "ipairs(publications)", "ipairs({})"),
        ("ack_and_publish", "if #entries == 0 and after == '' then", "if #entries == 0 then"),
        ("ack_and_publish", "after == '' and '-' or '(' .. after", "'-'"),
        ("requeue", "redis.call('LPUSH', QUEUE, message)", ""),
        ("requeue", "if held and held ~= 'running ' .. ARGV[1] then", "if false then"),
        ("renew", "return 0", "return redis.call('SET', KEYS[1], 'running ' .. ARGV[1])"),
        ("rescue", "if held_lease(KEYS[2]) then", "if false then"),
        ("rescue", "redis.call('SADD', WAITING", "redis.call('SISMEMBER', WAITING"),
        ("rescue", "redis.call('SREM', WAITING", "redis.call('SISMEMBER', WAITING"),
    ],
)
def test_a_bug_in_a_script_is_found(
    quiet_redis: Any, monkeypatch: pytest.MonkeyPatch, script: str, right: str, wrong: str
) -> None:
    """The comparison can fail: each of these leads to another state than the model's."""
    sources = script_calls.script_source
    assert right in sources(script)

    def script_source(name: str) -> str:
        source = sources(name)
        return source.replace(right, wrong) if name == script else source

    script_calls.script_sha.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(script_calls, "script_source", script_source)
        with pytest.raises(AssertionError):
            walk(quiet_redis, random.Random(20261126), STEPS)
    script_calls.script_sha.cache_clear()
