"""The public keys of a JWK set (RFC 7517), fetched in the background for all callers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import jwt

logger = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 30.0
"""The least time between two requests for a set that was fetched once."""
RETRY_SECONDS: Final = 5.0
"""The least time between two requests before the first success."""
_FRESH_SECONDS: Final = 270.0
_USABLE_SECONDS: Final = 600.0
_REQUEST_SECONDS: Final = 5


class JwksUnavailable(Exception):
    """The JWK set can't be fetched at present. The token may be valid: try again later."""


class JwkSet:
    """The keys that may sign, by their ids. No method waits longer than its caller asks for.

    A set is fetched again after about 5 minutes, or at most every 30 s if a token names an unknown
    key; it is no longer used after 10 minutes. Keys that no algorithm can use are skipped.
    """

    def __init__(self, url: str, algorithms: Sequence[str]) -> None:
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=_REQUEST_SECONDS)
        self._algorithms = algorithms
        self._keys: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._is_fetched = threading.Event()
        self._asked_at = -math.inf
        self.fetched_at = -math.inf
        """When the request for the current set began, by the monotonic clock."""
        self.version = 0
        """How often the set has changed."""

    def key(self, kid: object, wait: float = 0) -> Any | None:
        """Return the key of that id; None if the set has none.

        Args:
            wait: Seconds to wait for the first set.

        Raises:
            JwksUnavailable: There is no set, or it is too old.
        """
        if self._find(kid) is None or time.monotonic() - self.fetched_at > _FRESH_SECONDS:
            self._refresh()
        if not self._is_fetched.is_set():
            self._is_fetched.wait(wait)
        if time.monotonic() - self.fetched_at > _USABLE_SECONDS:
            raise JwksUnavailable("the JWK set can't be fetched")
        return self._find(kid)

    def _find(self, kid: object) -> Any | None:
        return self._keys.get(kid) if isinstance(kid, str) else None

    def _refresh(self) -> None:
        """Fetch the set in a thread, unless that was begun a short time ago."""
        pause = REFRESH_SECONDS if self._is_fetched.is_set() else RETRY_SECONDS
        with self._lock:
            now = time.monotonic()
            if now - self._asked_at < pause:
                return
            self._asked_at = now
        threading.Thread(target=self._fetch, args=[now], name="JWK set", daemon=True).start()

    def _fetch(self, now: float) -> None:
        try:
            keys = {
                key.key_id: key.key
                for key in self._client.get_jwk_set().keys
                if key.key_id and key.public_key_use in ("sig", None) and self._can_use(key)
            }
        except Exception as error:  # whatever the server sends
            logger.warning("the JWK set can't be fetched", extra={"error": type(error).__name__})
            return
        if keys.keys() != self._keys.keys():
            self.version += 1
        self._keys, self.fetched_at = keys, now
        self._is_fetched.set()

    def _can_use(self, key: jwt.PyJWK) -> bool:
        for name in self._algorithms:
            try:
                jwt.get_algorithm_by_name(name).prepare_key(key.key)
            except (jwt.PyJWTError, NotImplementedError, ValueError, TypeError):
                continue
            return True
        return False
