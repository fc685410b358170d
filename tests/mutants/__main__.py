"""Plants each mistake in a copy of the tree, and runs its test: it must fail.

Unit tests and tests with servers run side by side, each in a copy of their own. The stack of the
latter is that of the tree itself, so a mistake must be one that the test's own process makes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tests.mutants import MUTANTS, Mutant
from tests.support.checkout import REPOSITORY, listed_files
from tests.support.script_stack import script_stack
from tests.support.servers import RUNNING_STACK

_FAILED: Final = re.compile(r"^(?:\d+ \w+, )*\d+ failed", re.MULTILINE)


class Tree:
    """A copy of the tree, in which one mistake at a time is planted."""

    def __init__(self, path: Path, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self.path = path
        self._environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": str(path),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        self._times = count(int(time.time()))
        for name in listed_files():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, path / name)

    def run(self, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
        """Run tests with the product of this copy, also in the processes that they start."""
        options = ["-p", "no:hypothesispytest", "-p", "no:cacheprovider", "--timeout", "60", "-x"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.path,
            env=self._environment,
            capture_output=True,
            text=True,
        )

    def let_through(self, mutant: Mutant) -> str | None:
        """Run a mutant's test with it; return why that is wrong, or None."""
        file = self.path / mutant.file
        source = file.read_text()
        if source.count(mutant.right) != 1:
            return "the text is not found exactly once"
        self._write(file, source.replace(mutant.right, mutant.wrong))
        done = self.run([mutant.test])
        self._write(file, source)
        if done.returncode == 0:
            return "the test passes with it"
        if done.returncode != 1 or not _FAILED.search(done.stdout):
            return f"the test can't run with it:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
        return None

    def _write(self, file: Path, source: str) -> None:
        """Write with a time of its own: compiled modules are known by time and size."""
        file.write_text(source)
        written = next(self._times)
        os.utime(file, (written, written))


def check(tree: Tree, mutants: Sequence[Mutant]) -> int:
    """Print what becomes of each mutant; return how many are caught."""
    done = tree.run(sorted({each.test for each in mutants}))
    if done.returncode:
        print(f"tests fail without a mistake:\n{done.stdout[-5000:]}{done.stderr[-1000:]}")
        return 0
    caught = 0
    for mutant in mutants:
        place = f"{mutant.file}: {' '.join(mutant.wrong.split())[:60]!r}"
        began = time.monotonic()
        if (fault := tree.let_through(mutant)) is None:
            caught += 1
            print(f"caught in {time.monotonic() - began:4.1f} s  {place}", flush=True)
        else:
            print(f"WRONG   {place}\n        {mutant.test}\n        {fault}", flush=True)
    return caught


def main(words: list[str]) -> int:
    """Check all mutants, or those whose file or test has one of the words."""
    chosen = [each for each in MUTANTS if not words or any(w in " ".join(each) for w in words)]
    units = [each for each in chosen if each.test.startswith("tests/unit/")]
    others = [each for each in chosen if each not in units]
    with ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        directory.chmod(0o755)
        parts = [opened.enter_context(ThreadPoolExecutor(1)) for _ in range(2)]
        caught = []
        if units:
            caught.append(parts[0].submit(check, Tree(directory / "units"), units))
        if others:
            stack, _ = opened.enter_context(script_stack(workers=1))
            tree = Tree(directory / "others", {RUNNING_STACK: str(stack)})
            caught.append(parts[1].submit(check, tree, others))
        count = sum(each.result() for each in caught)
    print(f"{count} of {len(chosen)} planted mistakes are caught")
    return int(count < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
