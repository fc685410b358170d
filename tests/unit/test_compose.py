"""docker-compose.yml without Docker: it fits the schema, and runs what the local stack runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from worker.local.stack import BEAT, ENDPOINT, WORKER

FILE = Path(__file__).parents[2] / "docker-compose.yml"
OWN_SERVICES = ("migrate", "worker", "beat", "endpoint")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    parsed: dict[str, Any] = YAML(typ="safe").load(FILE)
    found: dict[str, Any] = parsed["services"]
    return found


def test_the_file_fits_the_compose_schema() -> None:
    """As check-jsonschema brings it along."""
    done = subprocess.run(
        [
            *[sys.executable, "-m", "check_jsonschema"],
            *["--builtin-schema", "vendor.compose-spec", str(FILE)],
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs_the_commands_of_the_local_stack(services: dict[str, Any]) -> None:
    """One place says how each part is started; this file agrees with it."""
    assert services["worker"]["command"] == WORKER
    assert services["beat"]["command"] == BEAT
    assert services["endpoint"]["command"][: len(ENDPOINT)] == ENDPOINT
    assert services["migrate"]["command"] == ["task-tags-admin", "migrate"]


def test_every_part_is_watched_and_started_again(services: dict[str, Any]) -> None:
    """Health checks and restarts, for all but the migration, which ends."""
    assert set(services) == {"postgres", "redis", *OWN_SERVICES}
    for name, service in services.items():
        if name != "migrate":
            assert service["healthcheck"]["test"]
            assert service["restart"] == "unless-stopped"


def test_redis_keeps_what_it_has_accepted(services: dict[str, Any]) -> None:
    """Append-only, evicting nothing, and without its default user; as the embedded one."""
    command = services["redis"]["command"][-1]
    for setting in ("--appendonly yes", "--maxmemory-policy noeviction", "user default off"):
        assert setting in command


def test_secrets_come_from_the_environment_and_are_required(services: dict[str, Any]) -> None:
    """None is in the file, and none has a default."""
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if any(word in name for word in ("PASSWORD", "SECRET", "URL")):
                assert "${" in value
                assert ":?}" in value


def test_our_parts_are_not_root_and_can_write_nothing(services: dict[str, Any]) -> None:
    """The image's user is not root; the file system is read-only, without capabilities."""
    assert "USER 10001" in (FILE.parent / "Dockerfile").read_text()
    for name in OWN_SERVICES:
        service = services[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "user" not in service
