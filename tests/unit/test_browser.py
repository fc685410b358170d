"""What needs a browser is left out where there is none, and says so."""

from __future__ import annotations

import pytest
from _pytest.outcomes import Skipped

from tests.support.browser import open_browser


def test_without_chromium_a_test_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not an error: the checks that come after the tests run all the same."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Skipped, match=r"no chromium, .* apt-get install chromium"):
        with open_browser():
            pass
