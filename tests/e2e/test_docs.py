"""The blocks of README and documentation do what the text says, on the running stack."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
from sqlalchemy import make_url

from tests.support.servers import Servers
from tools import reference

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"(?:<!-- (not run|until Ctrl-C)[^\n]* -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
SHOWN = re.compile(r"print\(.*\)  # (\[.*?\])")
RUN = """set -euo pipefail
if [ -e {saved} ]; then . {saved}; fi
set -a
{block}
set +a
{{ export -p; declare -f; }} > {saved}
"""


class Block(NamedTuple):
    mark: str
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = [Block(*parts) for parts in BLOCK.findall(page.read_text("utf-8"))]
    return [block for block in found if block.mark != "not run"]


WITH_BLOCKS = [page for page in PAGES if any(b.kind in ("python", "sh") for b in blocks(page))]


@pytest.fixture
def variables(servers: Servers, organization: UUID, token: str, tmp_path: Path) -> dict[str, str]:
    """What `make run` tells its user to set, and what an operator of servers has."""
    owner, worker, endpoint = map(
        make_url, (servers.owner_url, servers.worker_url, servers.endpoint_url)
    )
    secret = servers.settings.jwt_secret
    assert secret is not None
    passwords = {
        "WORKER_PASSWORD": str(worker.password),
        "ENDPOINT_PASSWORD": str(endpoint.password),
        "OWNER_URL": owner.render_as_string(hide_password=False),
        "WORKER_URL": worker.render_as_string(hide_password=False),
        "ENDPOINT_URL": endpoint.render_as_string(hide_password=False),
        "TASK_TAGS_JWT_SECRET": secret.get_secret_value(),
    }
    client = {
        "TASK_TAGS_REDIS_URL": servers.stack.redis_url,
        "TASK_TAGS_ENDPOINT_URL": servers.stack.endpoint_url,
        "TASK_TAGS_ORGANIZATION_ID": str(organization),
        "TASK_TAGS_TOKEN": token,
    }
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    quiet = {"PYTHONWARNINGS": "ignore"}  # of Celery, if the tests are run by root
    return {**os.environ, **passwords, **client, **quiet, "PATH": path, "HOME": str(tmp_path)}


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(
    page: Path, servers: Servers, organization: UUID, variables: dict[str, str], tmp_path: Path
) -> None:
    """One after the other, as a reader pastes them; comments and texts show what is printed."""
    variables |= {"TASK_TAGS_TOKEN": servers.token(organization, sub="developer")}
    printed = ""
    for mark, kind, text in blocks(page):
        if kind == "python":
            (tmp_path / "block.py").write_text(text, "utf-8")
            exported = f"{shlex.quote(sys.executable)} -W error block.py"
            printed = run(exported, variables, tmp_path)
            for shown in SHOWN.findall(text):
                assert shown in printed
        elif kind == "sh" and mark == "until Ctrl-C":
            printed = run_until_interrupted(text, variables, tmp_path)
        elif kind == "sh":
            printed = run(text, variables, tmp_path)
        elif kind == "text" and printed:
            for part in masked(text).split("…"):
                assert part in masked(printed)


def masked(text: str) -> str:
    """Return a text without white space, and with each id and time the same."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    return re.sub(r"\s", "", re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "TIME", text))


def script(text: str, directory: Path) -> str:
    return RUN.format(block=text, saved=shlex.quote(str(directory / "variables")))


def run(text: str, variables: dict[str, str], directory: Path) -> str:
    """Run a shell script with the variables that the scripts before it have set."""
    ended = subprocess.run(
        ["bash", "-c", script(text, directory)],
        env=variables,
        cwd=REPOSITORY if text.startswith("make ") else directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, f"{text}\n{ended.stdout}"
    return ended.stdout


def run_until_interrupted(text: str, variables: dict[str, str], directory: Path) -> str:
    """Run what goes on until Ctrl-C; press that when it is ready, or has printed something."""
    sign = re.compile(rb"ready" if re.search("worker worker|endpoint --", text) else rb".")
    command = ["bash", "-c", script(text, directory)]
    with subprocess.Popen(
        command,
        env=variables,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        before = []
        for line in process.stdout:
            before.append(line)
            if sign.search(line):
                break
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    printed = b"".join([*before, rest]).decode()
    codes = {0, 130, -signal.SIGINT, *([1] if "celery" in text else [])}  # a Celery worker has 1
    assert process.returncode in codes, printed
    return printed


def test_python_blocks_pass_the_strict_type_checker(tmp_path: Path) -> None:
    for page in WITH_BLOCKS:
        for number, (_, kind, text) in enumerate(blocks(page)):
            if kind == "python":
                name = f"{page.stem.lower().replace('-', '_')}_{number}.py"
                (tmp_path / name).write_text(text, "utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path)]
    checked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_json_blocks_are_json(page: Path) -> None:
    """One value, or one after the other."""
    for _, kind, text in blocks(page):
        while kind == "json" and (text := text.strip()):
            _, end = json.JSONDecoder().raw_decode(text)
            text = text[end:]


def test_few_blocks_are_exceptions() -> None:
    marks = [mark for page in PAGES for mark, *_ in BLOCK.findall(page.read_text("utf-8"))]
    assert 0 < marks.count("not run") <= 5


def test_the_reference_is_what_the_code_says() -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(), "run: make docs"
