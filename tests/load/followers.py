"""Clients begin at random moments of random changes, and follow work lists by HTTP alone.

python -m tests.load.followers [--changes 100000] [--clients 50] [--seed N]. Writers of two
organizations use the same names. Each client reads one of ten random lists with `limit=7` while the
writers go on, then the changes behind the first cursor, in pages and in streams. In the end its
tasks are compared with SQL. The last line is `followers: seed=… changes=… clients=… pages=…
differing=0 gaps=0 doubled=0`; the exit code is 1 if one of the last three is not 0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from itertools import islice
from typing import Any, Final
from uuid import UUID

import httpx
import psycopg
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from producers.client import TagProducer
from producers.contract import messages
from tests.support.script_stack import script_stack
from tests.support.servers import servers_of

SECONDS: Final = 120.0
WATCHED, OTHER = UUID(int=1), UUID(int=2)
POSITION: Final = "select coalesce(max(position), 0) from organizations where organization_id = %s"
TYPES: Final = ("review_status", "a:b", "c\\d:", "é")
TAGS: Final = ("pending", "x:y", "\\", "100 % & more=+")
TASKS: Final = ("one", "two", "a/b", "a:b", "c\\", "d e", "é?", "100%")
STATES: Final[Sequence[messages.TaskState]] = ("queued", "running", "awaiting_input", "completed")
FLOWS: Final = ("invoices", "a:\\b")
FILTERS: Final = {"task_name": TASKS, "state": STATES, "flow_id": FLOWS}
Key = tuple[str, str]  # a task: its flow execution and its name
Wanted = dict[str, list[Any]]  # the parameters of a list; a selector is a type and a tag or None


def random_message(chance: random.Random, executions: range) -> messages.Message:
    kind, one, two = chance.random(), *(UUID(int=each) for each in chance.choices(executions, k=2))
    if kind < 0.05:
        names = TASKS[: chance.randint(2, len(TASKS))] if one.int % 2 else None
        return messages.register_execution(one, names, chance.choice([None, *FLOWS]))
    if kind < 0.15:
        clear = chance.sample(TYPES, chance.randint(0, 2)) or None
        return messages.set_task_state(one, chance.choice(TASKS), chance.choice(STATES), clear)
    builders: list[Any] = [messages.add, messages.remove, messages.set_tag]
    tags = []
    for build in chance.choices(builders, [6, 3, 1], k=chance.randint(1, 5)):
        named = chance.choice([one, two]), *map(chance.choice, (TASKS, TYPES, TAGS))
        metadata: Any = chance.choice([[], [], [None], [1], [{"by": "ada"}]])
        tags.append(build(*named, *metadata))
    return messages.TagBatch(tags=tags)


def write(producer: TagProducer, seed: str, position: Callable[[], int], changes: int) -> None:
    """Enqueue random messages until they are enough, and wait until they were applied."""
    chance = random.Random(seed)
    with producer:
        while (number := position()) < changes:
            newest = number // 1000 + 10  # executions come and go, so old tags seldom change
            some = range(0 if chance.random() < 0.02 else max(0, newest - 20), newest)
            piece = [random_message(chance, some) for _ in range(chance.randint(1, 50))]
            producer.enqueue_many(piece, block=SECONDS)
        producer.submit(messages.register_execution(WATCHED), SECONDS).result(SECONDS)


def random_list(chance: random.Random, is_single: bool) -> Wanted:
    first, *types = chance.sample(TYPES, len(TYPES))
    wanted: Wanted = {"with": [(first, chance.choice(TAGS))]}
    more = 0 if is_single else chance.randint(1, 2)
    for name in chance.sample(["with", "without", *FILTERS], more):
        if name in FILTERS:
            wanted[name] = chance.sample(FILTERS[name], 1 + (name == "state"))
        else:
            wanted.setdefault(name, []).append((types.pop(), chance.choice([None, *TAGS])))
    return wanted


def parameter(value: str | tuple[str, str | None]) -> str:
    if isinstance(value, str):
        return value
    escaped = value[0].replace("\\", "\\\\").replace(":", "\\:")
    return escaped if value[1] is None else f"{escaped}:{value[1]}"


def stored(owner: psycopg.Connection, wanted: Wanted, is_single: bool) -> dict[Key, set[Any]]:
    """Return what the tables say of the tasks of a list, as `Client.tasks` has it."""
    filters = {name: wanted[name] for name in FILTERS if name in wanted}
    values, having = [*wanted["with"][0], is_single, WATCHED, *filters.values()], []
    for name, negated in (("with", ""), ("without", "not ")):
        for selector in wanted.get(name, []):
            having.append(f"{negated}bool_or(tag_type = %s and tag = coalesce(%s, tag))")
            values += selector
    statement = f"""
        select flow_execution_id::text, task_name, flow_id, state,
               array_agg(id::text) filter (where (tag_type, tag) = (%s, %s) or not %s)
          from task_tags join flow_executions using (organization_id, flow_execution_id)
          left join task_executions using (organization_id, flow_execution_id, task_name)
         where organization_id = %s and status = 'active'
               {"".join(f" and {name} = any(%s)" for name in filters)}
         group by flow_execution_id, task_name, flow_id, state having {" and ".join(having)}"""
    rows = owner.execute(statement.encode(), values).fetchall()
    return {(row[0], row[1]): {*row[4], *(() if is_single else row[2:4])} for row in rows}


class Client:
    """Reads a list, and follows it with nothing but what HTTP gives.

    With one selector, changes add and remove tags; else it asks again for each task that changed.
    """

    def __init__(self, url: str, token: str, wanted: Wanted, seed: str) -> None:
        self._url, self._auth = url, {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=url, headers=self._auth, timeout=60, trust_env=False)
        self._chance, self._wanted = random.Random(seed), wanted
        self._query = {name: [*map(parameter, values)] for name, values in wanted.items()}
        self._is_single = sum(map(len, wanted.values())) == 1
        names = ("tag_type", "tag") if self._is_single and self._chance.random() < 0.5 else ()
        self._filter = dict(zip(names, wanted["with"][0], strict=False))
        self.tasks: dict[Key, set[Any]] = {}
        """The ids of the tags that match, by task; of another list, those of all and two fields."""
        self._touched: dict[Key, None] = {}
        self._cursor, self.counts = "", Counter[str]()

    @property
    def position(self) -> int:
        return int(self._cursor.partition("-")[0])

    def run(self, written: threading.Event) -> None:
        """Follow the list until nothing more is written, and the last change is known."""
        with self._http:
            self._read_list()
            is_end = is_head = False
            while not (is_end and is_head):
                is_end = written.is_set()
                if is_end or (not is_head and self._chance.random() < 0.6):
                    is_head = not self._read_changes()
                else:
                    self._stream()
                    is_head = False
                self._ask(1)
            self._ask(len(self._touched))

    def compare(self, owner: psycopg.Connection, head: int) -> Counter[str]:
        """Return the counts of what was read, and of what is wrong."""
        expected = stored(owner, self._wanted, self._is_single)
        found = {key: values for key, values in self.tasks.items() if values}
        wrong = [key for key in found | expected if found.get(key) != expected.get(key)]
        if wrong:
            print(f"{self._query} differs in {wrong}")
        self.counts.update(tasks=len(expected), differing=len(wrong), gaps=self.position != head)
        return self.counts

    def _get(self, path: str, query: dict[str, Any]) -> httpx.Response:
        while (response := self._http.get(path, params=query)).status_code == 503:
            time.sleep(1)  # it waited too long behind other reads
        return response.raise_for_status()

    def _read_list(self) -> None:
        """Read it page by page. A task may come again only behind its place, with a later tag."""
        query, last = {**self._query, "limit": 7}, ("", "")
        while query.get("page", "") is not None:
            answer = self._get("/task-executions", query).json()
            self._cursor = self._cursor or answer["cursor"]
            self.counts["pages"] += 1
            self.counts["later"] += answer["cursor"] != self._cursor
            for task in answer["task_executions"]:
                place = task["waiting_since"], self._know(task)
                self.counts["doubled"] += place <= last
                last = place
            query["page"] = answer["next_page"]

    def _know(self, task: dict[str, Any]) -> str:
        """Take a task over from a list; return the id of its oldest tag that matches."""
        matching = [tag["id"] for tag in task["tags"] if self._matches(tag)]
        fields = {task["flow_id"], task["state"], *(tag["id"] for tag in task["tags"])}
        key = task["flow_execution_id"], task["task_name"]
        self.tasks[key] = set(matching) if self._is_single else fields
        return matching[0] if matching else ""

    def _matches(self, tag: dict[str, Any]) -> bool:
        self.counts["differing"] += tag["organization_id"] != str(WATCHED)
        return bool((tag["tag_type"], tag["tag"]) == self._wanted["with"][0])

    def _read_changes(self) -> bool:
        """Read a page of changes; return whether there are more."""
        limit = self._chance.choice([7, 500, 1000])
        response = self._get("/changes", {**self._filter, "after": self._cursor, "limit": limit})
        for event in response.json()["changes"]:
            self._take(event)
        self._cursor = response.json()["cursor"]
        return "next" in response.links

    def _stream(self) -> None:
        """Take some of the next changes from a stream, until nothing comes for a second."""
        query = {**self._filter, "after": self._cursor}
        frames = self._chance.choice([self._events, self._socket])(query)
        with suppress(TimeoutError, ConnectionClosed, httpx.TransportError), closing(frames):
            for frame in map(json.loads, islice(frames, self._chance.randint(1, 300))):
                if "changes" in frame:
                    self._take(frame)
                self._cursor = frame["cursor"]

    def _events(self, query: dict[str, Any]) -> Generator[str]:
        with self._http.stream("GET", "/changes/events", params=query, timeout=1.0) as answer:
            lines = answer.raise_for_status().iter_lines()
            yield from (line[6:] for line in lines if line.startswith("data: "))

    def _socket(self, query: dict[str, Any]) -> Generator[str]:
        url = f"{self._url.replace('http', 'ws', 1)}/changes?{httpx.QueryParams(query)}"
        with connect(url, additional_headers=self._auth, max_queue=None) as socket:
            while True:
                yield str(socket.recv(1.0))

    def _take(self, event: dict[str, Any]) -> None:
        step = event["position"] - self.position
        self.counts["gaps"] += step < 1 if self._filter else step != 1
        self.counts["differing"] += event["organization_id"] != str(WATCHED)
        self._cursor = event["cursor"]
        for change in event["changes"]:
            about = change.get("tag") or change["task"]
            key = about["flow_execution_id"], about["task_name"]
            if not self._is_single:
                if key[1] in self._wanted.get("task_name", TASKS):
                    self._touched[key] = None
            elif change["change"] != "state" and self._matches(about):
                ids = self.tasks.setdefault(key, set())
                (ids.add if change["change"] == "added" else ids.discard)(about["id"])

    def _ask(self, count: int) -> None:
        """Ask for some of the tasks that have changed, in the order of their first change."""
        for key in list(islice(self._touched, count)):
            del self._touched[key]
            self.tasks.pop(key, None)
            one = {"flow_execution_id": key[0], "task_name": key[1]}
            answer = self._get("/task-executions", {**self._query, **one}).json()
            for task in answer["task_executions"]:
                self._know(task)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    arguments = parser.parse_args()
    seed, chance, counts = arguments.seed, random.Random(arguments.seed), Counter[str]()
    print(f"seed {seed}", flush=True)
    lists = [random_list(chance, number < 4) for number in range(10)]
    begins = sorted(chance.randrange(arguments.changes) for _ in range(arguments.clients))
    with script_stack(workers=2) as (_, stack), ExitStack() as opened:

        def position() -> int:
            return int(owner.execute(POSITION, [WATCHED]).fetchall()[0][0])

        servers, redis = servers_of(stack), stack.redis_url
        sign, owner = servers.token, opened.enter_context(servers.owner())
        producers = [
            TagProducer(redis_url=redis, organization_id=of, token=sign(of), inbox_limit=300)
            for of in (WATCHED, WATCHED, WATCHED, OTHER)
        ]
        clients = [
            Client(stack.endpoint_url, sign(WATCHED), chance.choice(lists), f"{seed} {number}")
            for number in range(arguments.clients)
        ]
        pool = opened.enter_context(ThreadPoolExecutor(len(producers) + len(clients)))
        written = threading.Event()
        opened.callback(written.set)  # threads end, whatever happens
        running = [
            pool.submit(write, producer, f"{seed} writer {number}", position, arguments.changes)
            for number, producer in enumerate(producers)
        ]
        for begin, client in zip(begins, clients, strict=True):
            while position() < begin and not running[0].done():
                time.sleep(0.01)
            running.append(pool.submit(client.run, written))
        wait(running[: len(producers)])
        written.set()
        for each in running:
            each.result()
        head = position()
        for client in clients:
            counts += client.compare(owner, head)
    print(f"{counts['later']} pages were later than the cursor; {counts['tasks']} tasks in the end")
    kinds = ("pages", "differing", "gaps", "doubled")
    counted = " ".join(f"{kind}={counts[kind]}" for kind in kinds)
    print(f"followers: seed={seed} changes={head} clients={len(clients)} {counted}")
    return 1 if any(counts[kind] for kind in kinds[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
