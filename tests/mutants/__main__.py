"""Plants each mistake in a copy of the tree, and runs its test: it must fail."""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Final

from tests.mutants import MUTANTS, Mutant

ROOT: Final = Path(__file__).parents[2]
_COPIES: Final = 2
_FAILED: Final = re.compile(r"^(?:\d+ \w+, )*\d+ failed", re.MULTILINE)


class Tree:
    """A copy of the tree, in which one mistake at a time is planted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._times = count(int(time.time()))
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)

    def run(self, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
        """Run tests with the product of this copy, also in the processes that they start."""
        options = ["-p", "no:hypothesispytest", "-p", "no:cacheprovider", "--timeout", "60", "-x"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": ""},
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


def main(words: list[str]) -> int:
    """Check all mutants, or those whose file or test has one of the words."""
    chosen = [each for each in MUTANTS if not words or any(w in " ".join(each) for w in words)]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        Path(name).chmod(0o755)
        trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(_COPIES):
            trees.put(Tree(Path(name) / f"tree {number}"))
        tree = trees.get()
        done = tree.run(sorted({each.test for each in chosen}))
        trees.put(tree)
        if done.returncode:
            print(f"tests fail without a mistake:\n{done.stdout[-5000:]}{done.stderr[-1000:]}")
            return 1

        def check(mutant: Mutant) -> str | None:
            tree = trees.get()
            try:
                return tree.let_through(mutant)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(_COPIES) as threads:
            for mutant, fault in zip(chosen, threads.map(check, chosen), strict=True):
                place = f"{mutant.file}: {' '.join(mutant.wrong.split())[:60]!r}"
                if fault is not None:
                    wrong += 1
                    print(f"WRONG   {place}\n        {mutant.test}\n        {fault}", flush=True)
                else:
                    print(f"caught  {place}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} planted mistakes are caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
