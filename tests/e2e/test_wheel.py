"""What `pip install` puts into an environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_becomes_no_other_applications_configuration(tmp_path: Path) -> None:
    """Celery imports any top-level `celeryconfig`; the wheel has its own inside `worker`."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    tops = {name.partition("/")[0] for name in names if "dist-info" not in name}
    assert tops == {"producers", "worker", "task_tags.py"}
    assert {"producers/inbox/scripts/append.lua", "worker/api/page/index.html"} <= names
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from worker import broker\n"
        f"assert broker.__file__.startswith({str(tmp_path)!r}), broker.__file__\n"
        "conf = broker.create_app('test', 'redis://localhost').conf\n"
        "print(conf.task_default_queue, conf.worker_pool, sorted(conf.beat_schedule))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "task-tags solo ['purge', 'wake']", done.stderr


def test_an_installation_without_the_worker_says_what_to_install() -> None:
    """`task-tags-admin` comes with the base package, which has no psycopg."""
    program = "import sys; sys.modules['psycopg'] = None\nfrom worker.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install '.[worker]'" in line
