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


OF_A_TEST_MODULE = re.compile(
    r"^ *(?:from|import) +(?:\.|tests(?:\.| +import +)(?:unit|integration|e2e|conftest)\b).*",
    re.MULTILINE,
)


def base_install() -> Iterator[Distribution]:
    """Yield what `pip install task-tags` installs, without extras: the closure of its requirements."""
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


def loaded(site: Path, statement: str) -> set[str]:
    """Run a statement with that site directory alone, and return the top-level modules it loads."""
    program = (
        f"import sys; sys.path.append({str(site)!r}); {statement}; import json; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import producers.client",
        "import producers.subscriber",
        "import producers.cli",
        "from producers.client import TagProducer; TagProducer(organization_id='0' * 32, token='t')",
    ],
)
def test_a_flow_runner_loads_nothing_of_the_worker(clean: Path, statement: str) -> None:
    """In an environment with only the base install; so it can't have been there by chance."""
    assert not loaded(clean, statement) & WORKERS_OWN


def test_the_contract_loads_pydantic_alone(clean: Path) -> None:
    """A leaf: whoever only reads results needs no client."""
    assert not loaded(clean, "import producers.contract.messages") & {
        "celery",
        "kombu",
        "redis",
        "httpx",
    }


def test_the_rules_load_no_celery_redis_or_sqlalchemy() -> None:
    """`import worker.rules` brings the contract and the standard library."""
    site = Path(sysconfig.get_paths()["purelib"])
    modules = loaded(site, f"sys.path.append({str(REPOSITORY)!r}); import worker.rules")
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
