"""make count: counts the product's code lines by package; BASE=<commit> also counts a commit's.

A code line has something other than blanks, a comment or a docstring on it. A string that is a
whole statement is a docstring, wherever it stands. Lua is counted with the package whose folder it
is in. The steps of the migrations are not counted: they only grow, and are never changed.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tokenize
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

REPOSITORY: Final = Path(__file__).parents[2]
PRODUCT: Final = re.compile(
    r"((producers|worker)/(?!.*migrations/versions/).*\.(py|lua)|celeryconfig\.py|task_tags\.py)"
)
_NO_CODE: Final = {
    *(tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}
_LUA_LONG_COMMENT: Final = re.compile(r"--\[\[.*?\]\]", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="a commit to compare with")
    arguments = parser.parse_args()
    packages = count(read_working_tree())
    total = packages.total()
    for package, lines in sorted(packages.items()):
        print(f"{package:<24} {lines:>6}")
    print(f"{'total':<24} {total:>6}")
    if arguments.base:
        base = count(read_commit(arguments.base)).total()
        print(f"{f'total of {arguments.base}':<24} {base:>6}")
        print(f"{'ratio':<24} {total / base:>6.3f}")


def count(files: Mapping[str, str]) -> Counter[str]:
    """Return the code lines of each package. `files`: texts by path, of the product alone."""
    found: Counter[str] = Counter()
    for path, text in files.items():
        lines = lua_lines(text) if path.endswith(".lua") else python_lines(text)
        found[_package(path, files)] += lines
    return found


def read_working_tree() -> dict[str, str]:
    """Return the product's files as they are now, committed or not."""
    paths = (path.relative_to(REPOSITORY).as_posix() for path in _candidates())
    return {path: (REPOSITORY / path).read_text() for path in paths if PRODUCT.fullmatch(path)}


def _candidates() -> list[Path]:
    folders = (REPOSITORY / "producers", REPOSITORY / "worker")
    return [*REPOSITORY.glob("*.py"), *(path for each in folders for path in each.rglob("*.*"))]


def read_commit(commit: str) -> dict[str, str]:
    """Return the product's files as they are in a commit."""
    argv = ["git", "-C", str(REPOSITORY), "archive", "--format=tar", commit]
    done = subprocess.run(argv, capture_output=True)
    if done.returncode:
        raise SystemExit(f"count: {commit} can't be read: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        return {
            member.name: file.read().decode()
            for member in archive.getmembers()
            if PRODUCT.fullmatch(member.name) and (file := archive.extractfile(member))
        }


def _package(path: str, files: Mapping[str, str]) -> str:
    """Return the nearest package around a file, or the name of a module that is in none."""
    for folder in PurePosixPath(path).parents:
        if f"{folder}/__init__.py" in files:
            return ".".join(folder.parts)
    return PurePosixPath(path).stem


def python_lines(text: str) -> int:
    """Count the code lines of a Python module."""
    docstrings = [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _NO_CODE or any(a <= token.start < b for a, b in docstrings):
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
    texts = text.split("\n")
    return sum(1 for number in lines if texts[number - 1].strip())


def lua_lines(text: str) -> int:
    """Count the code lines of a Lua script."""
    lines = _LUA_LONG_COMMENT.sub("", text).splitlines()
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("--"))


if __name__ == "__main__":
    main()
