"""Keys from a JWK set, which a server publishes: which are taken, and when it is asked again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import jwt
import pytest

from tests.support.keys import AUDIENCE, CLAIMS, KEYS, MADE_FOR_US, NOW, part, settings
from tests.support.waiting import eventually
from worker import jwk_set
from worker.auth import Authorizer, InvalidToken
from worker.jwk_set import JwksUnavailable


class JwksServer:
    """Serves a JWK set, which a test may change, and counts the requests."""

    def __init__(self) -> None:
        self.body = b""
        self.requests = 0
        serving = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                serving.requests += 1
                self.send_response(200)
                self.end_headers()
                self.wfile.write(serving.body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01])
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks"

    def publish(self, **keys: Any) -> None:
        self.body = json.dumps({"keys": [jwk_of(kid, key) for kid, key in keys.items()]}).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def authorizer(self) -> Authorizer:
        return Authorizer(
            settings(jwt_secret=None, jwt_algorithms=("ES256",), jwt_jwks_url=self.url, **AUDIENCE)
        )


def jwk_of(kid: str, key: Any) -> dict[str, Any]:
    if isinstance(key, dict):
        return {"kid": kid, **key}
    jwk: dict[str, Any] = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    return {**jwk, "kid": kid, "use": "sig", "alg": "ES256"}


def named(kid: str | None, key: Any = KEYS["ES256"]) -> str:
    headers = {"kid": kid} if kid else None
    return jwt.encode(CLAIMS | MADE_FOR_US, key, "ES256", headers=headers)


@pytest.fixture
def keys() -> Iterator[JwksServer]:
    server = JwksServer()
    yield server
    server.close()


def test_keys_may_come_from_a_jwk_set(keys: JwksServer) -> None:
    """The token's `kid` names the key; unknown ones, and tokens without, are refused."""
    keys.publish(one=KEYS["ES256"])
    authorizer = keys.authorizer()
    assert authorizer.verify(named("one"), NOW).actor == "ada"
    for wrong in (named("two"), named(None), "garbage"):
        with pytest.raises(InvalidToken):
            authorizer.verify_now(wrong)


def test_keys_that_can_not_be_used_are_skipped(keys: JwksServer) -> None:
    """Secrets, keys of other algorithms, of other uses, and what is no key at all."""
    rsa_key = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(KEYS["RS256"].public_key()))
    keys.publish(
        secret={"kty": "oct", "k": part("x" * 64)},
        other={**rsa_key, "alg": "RS256"},
        encrypts=jwk_of("encrypts", KEYS["ES256"]) | {"use": "enc"},
        strange={"kty": "strange"},
        half={"kty": "EC", "crv": "P-256"},
        one=KEYS["ES256"],
    )
    authorizer = keys.authorizer()
    assert authorizer.verify(named("one"), NOW).actor == "ada"
    for kid in ("secret", "other", "encrypts", "strange", "half"):
        with pytest.raises(InvalidToken):
            authorizer.verify_now(named(kid))


def test_unknown_keys_cost_one_request_for_all(keys: JwksServer) -> None:
    """However many tokens name them, and without waiting for the answer."""
    keys.publish(one=KEYS["ES256"])
    authorizer = keys.authorizer()
    authorizer.verify(named("one"), NOW)
    for number in range(200):
        with pytest.raises(InvalidToken):
            authorizer.verify_now(named(f"{number}"))
    assert keys.requests == 1


def test_a_message_waits_for_keys_that_were_fetched_after_it_was_seen(
    keys: JwksServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was published a moment ago is found; a key that is in no set is refused then."""
    keys.publish(one=KEYS["ES256"])
    authorizer = keys.authorizer()
    authorizer.verify(named("one"), NOW)
    two, three = named("two"), named("three")
    for token in (two, three):
        with pytest.raises(JwksUnavailable):
            authorizer.verify(token, NOW)
    keys.publish(one=KEYS["ES256"], two=KEYS["ES256"])
    monkeypatch.setattr(jwk_set, "REFRESH_SECONDS", 0)
    eventually(lambda: verified(authorizer, two))
    with pytest.raises(InvalidToken):
        authorizer.verify(three, NOW)
    with pytest.raises(JwksUnavailable):  # accepted later, perhaps after the key was published
        authorizer.verify(three, NOW + 1)


def verified(authorizer: Authorizer, token: str) -> bool:
    with suppress(JwksUnavailable):
        return authorizer.verify(token, NOW).actor == "ada"
    return False


def test_a_token_ends_with_its_key(keys: JwksServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set without the key ends what is remembered of its tokens."""
    keys.publish(one=KEYS["ES256"])
    authorizer = keys.authorizer()
    authorizer.verify(named("one"), NOW)
    keys.publish(two=KEYS["ES256"])
    monkeypatch.setattr(jwk_set, "REFRESH_SECONDS", 0)
    eventually(lambda: verified(authorizer, named("two")))
    with pytest.raises(InvalidToken):
        authorizer.verify_now(named("one"))


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"keys": []}', b"[]", b"\xff"])
def test_a_jwk_set_that_can_not_be_read_is_not_the_tokens_fault(
    keys: JwksServer, body: bytes
) -> None:
    """The message is tried again later, instead of being refused for good."""
    keys.body = body
    with pytest.raises(JwksUnavailable):
        keys.authorizer().verify(named("one"), NOW)


def test_a_jwk_set_that_is_away_is_not_the_tokens_fault(keys: JwksServer) -> None:
    authorizer = keys.authorizer()
    keys.url = "http://127.0.0.1:1/jwks"
    for verify in (keys.authorizer().verify_now, lambda token: authorizer.verify(token, NOW)):
        with pytest.raises(JwksUnavailable):
            verify(named("one"))
