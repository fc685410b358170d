"""The revision in the ETag of an answer."""

from __future__ import annotations

import httpx

from producers.contract.cursors import Cursor


def revision_of(response: httpx.Response) -> int:
    return Cursor.parse(response.headers["etag"].strip('"')).number
