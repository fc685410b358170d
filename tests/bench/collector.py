"""Keeps the garbage collector out of a measurement, for all contenders as for the product."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Exempt what exists from garbage collection, and collect seldom from now on."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
