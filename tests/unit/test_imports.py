"""What each part imports, in the product and in the tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
WORKERS_OWN = {
    "celery",
    "kombu",
    "sqlalchemy",
    "psycopg",
    "fastapi",
    "uvicorn",
    "alembic",
    "jwt",
    "worker",
}


OF_A_FLOW_RUNNER = [
    "import producers.client",
    "import producers.subscriber",
    "import producers.tag_reader",
    "import producers.cli",
    "from producers.client import TagProducer; TagProducer(organization_id='0' * 32, token='t')",
]
OF_THE_CONTRACT = "import producers.contract.messages"
OF_A_TEST_MODULE = re.compile(
    r"^ *(?:from|import) +(?:\.|tests(?:\.| +import +)(?:unit|integration|e2e|conftest)\b).*",
    re.MULTILINE,
)


def base_install() -> Iterator[Distribution]:
    """Yield the closure of the requirements that `pip install task-tags` installs, no extras."""
    waiting, seen = [Requirement("task-tags")], set()
    while waiting:
        requirement = waiting.pop()
        found = distribution(requirement.name)
        if requirement.name != "task-tags":
            yield found
        for line in found.requires or []:
            needed = Requirement(line)
            extras = {"", *requirement.extras}
            wanted = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras
            )
            key = (needed.name, frozenset(needed.extras))
            if wanted and key not in seen:
                seen.add(key)
                waiting.append(needed)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site directory that has the base install and nothing else."""
    site = tmp_path_factory.mktemp("base install")
    for installed in base_install():
        for file in installed.files or []:
            top = file.parts[0]
            source = Path(str(installed.locate_file(top)))
            if top not in ("..", "__pycache__") and not (site / top).exists() and source.exists():
                (site / top).symlink_to(source)
    for own in ("producers", "celeryconfig.py"):
        (site / own).symlink_to(REPOSITORY / own)
    return site


def loaded(site: Path, *statements: str) -> dict[str, set[str]]:
    """Run statements with that site directory alone; return the top-level modules loaded by each.

    They run in one process, for speed, so the modules of those before it count as well. Ours are
    loaded again each time.
    """
    program = f"""
import json, sys
sys.path.append({str(site)!r})
for statement in {statements!r}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "producers"]:
        del sys.modules[name]
    exec(statement, {{}})
    print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(statements, map(set, map(json.loads, done.stdout.splitlines())), strict=True))


@pytest.fixture(scope="module")
def loaded_by(clean: Path) -> dict[str, set[str]]:
    return loaded(clean, OF_THE_CONTRACT, *OF_A_FLOW_RUNNER)


@pytest.mark.parametrize("statement", OF_A_FLOW_RUNNER)
def test_a_flow_runner_loads_nothing_of_the_worker(
    loaded_by: dict[str, set[str]], statement: str
) -> None:
    """In an environment with only the base install; so it can't have been there by chance."""
    assert not loaded_by[statement] & WORKERS_OWN


def test_the_contract_loads_pydantic_alone(loaded_by: dict[str, set[str]]) -> None:
    """A leaf: code that only reads results needs no client."""
    assert not loaded_by[OF_THE_CONTRACT] & {"celery", "kombu", "redis", "httpx"}


def test_the_rules_load_no_celery_redis_or_sqlalchemy() -> None:
    """`import worker.rules` brings the contract and the standard library."""
    site = Path(sysconfig.get_paths()["purelib"])
    statement = f"import sys; sys.path.append({str(REPOSITORY)!r}); import worker.rules"
    modules = loaded(site, statement)[statement]
    assert not modules & {"celery", "kombu", "redis", "sqlalchemy", "psycopg", "fastapi"}


@pytest.mark.parametrize(
    "line",
    [
        "from {tests}.unit.test_rules import batch",
        "    from {tests}.e2e import test_cli",
        "from {tests} import conftest",
        "import {tests}.integration.test_api",
        "from .test_rules import batch",
    ],
)
def test_an_import_from_a_test_module_is_noticed(line: str) -> None:
    """In each form that an import can have."""
    line = line.format(tests="tests")
    assert OF_A_TEST_MODULE.findall(f"import json\n{line}\n") == [line]


def test_nothing_is_imported_from_a_test_module() -> None:
    """What several tests use is in tests/support."""
    files = list((REPOSITORY / "tests").rglob("*.py"))
    assert Path(__file__) in files
    found = {file: OF_A_TEST_MODULE.findall(file.read_text()) for file in files}
    assert not [f"{file}: {line}" for file, lines in found.items() for line in lines]
