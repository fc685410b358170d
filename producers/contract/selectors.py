"""Selectors of the work list: which tags a task has (docs/concepts/contract.md#rule-14)."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from producers.contract.values import TagName, TagType

_SELECTOR: Final = re.compile(r"((?:[^\\:]|\\[\\:])+)(?::(.*))?", re.DOTALL)


class Selector(NamedTuple):
    """Matches a task that has this tag, or any tag of the type if `tag` is None."""

    tag_type: TagType
    tag: TagName | None = None

    def __str__(self) -> str:
        escaped = re.sub(r"[\\:]", r"\\\g<0>", self.tag_type)
        return escaped if self.tag is None else f"{escaped}:{self.tag}"

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read `type` or `type:tag`, with a backslash before `:` and `\\` in the type.

        Raises `ValueError`.
        """
        found = _SELECTOR.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not TYPE or TYPE:TAG")
        try:
            return _CHECKED.validate_python((re.sub(r"\\(.)", r"\1", found[1]), found[2]))
        except ValidationError:
            raise ValueError(f"in {text!r}, type or tag is empty, too long or has U+0000") from None


_CHECKED: Final = TypeAdapter(Selector)
