"""Tokens (docs/concepts/contract.md#tokens): what each key accepts, and every wrong token."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from uuid import uuid4

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import SecretStr

from producers.errors import ConfigurationError
from worker.auth import SCOPES, WRITE, Authorizer, InvalidToken, JwksUnavailable, sign_token
from worker.settings import Settings

SECRET = "a secret of at least thirty-two bytes"
NOW = time.time()
ORGANIZATION = uuid4()
CLAIMS: dict[str, Any] = {
    "sub": "ada",
    "org": str(ORGANIZATION),
    "scope": "task-tags:read task-tags:write",
    "exp": NOW + 3600,
}
KEYS: dict[str, Any] = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "RS256": rsa.generate_private_key(65537, 2048),
}


def settings(**values: Any) -> Settings:
    return Settings.model_construct(**{"jwt_secret": SecretStr(SECRET), **values})


def public(key: Any) -> str:
    encoded: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded.decode()


def signed(key: Any = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    given = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not ...}
    return jwt.encode(given, key, algorithm=algorithm)


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_a_good_token_tells_who_acts_for_whom_and_may_do_what() -> None:
    """Rule 7: actor and organization come from the token."""
    grant = Authorizer(settings()).verify(signed(), NOW)
    assert (grant.organization_id, grant.actor) == (ORGANIZATION, "ada")
    assert grant.allows(WRITE)
    assert not grant.allows("flow-executions:write")


def unsigned() -> str:
    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(CLAIMS)}."


def headless() -> str:
    head = part({"alg": "HS256", "jku": "http://localhost:1/keys", "kid": "../x"})
    return f"{head}.{part(CLAIMS)}.AA"


@pytest.mark.parametrize(
    "token",
    [
        "",
        None,
        b"",
        "garbage",
        "a.b.c",
        b"\xff\xfe\xff",
        "é" * 10,
        "x" * 10_000,
        unsigned(),
        headless(),
        signed("another secret of at least 32 bytes"),
        signed() + "x",
        signed()[:-3],
        signed(exp=NOW - 31),
        signed(exp=...),
        signed(exp="soon"),
        signed(exp=[1]),
        signed(nbf=NOW + 31),
        signed(iat=NOW + 31),
        signed(nbf="x"),
        signed(exp=float("nan")),
        signed(exp=float("inf")),
        signed(sub=...),
        signed(sub=""),
        signed(sub="x" * 201),
        signed(sub="a\0"),
        signed(org=...),
        signed(org="not a uuid"),
        signed(org=None),
        signed(org=5),
        signed(scope=5),
    ],
)
def test_a_wrong_token_proves_nothing(token: str | bytes | None) -> None:
    """It is refused, and the error does not repeat the token."""
    with pytest.raises(InvalidToken) as caught:
        Authorizer(settings()).verify(token, NOW)
    text = token.decode(errors="replace") if isinstance(token, bytes) else token
    assert not text or text not in str(caught.value)


def test_a_token_must_be_valid_when_the_message_was_accepted() -> None:
    """Not when it is applied: what waited long in the inbox is still authorized. Leeway: 30 s."""
    authorizer = Authorizer(settings())
    token = signed(exp=NOW - 1000, nbf=NOW - 2000)
    for at in (NOW - 2030, NOW - 1500, NOW - 970):
        assert authorizer.verify(token, at).actor == "ada"
    for at in (NOW, NOW - 969, NOW - 2031):
        with pytest.raises(InvalidToken):
            authorizer.verify(token, at)


@pytest.mark.parametrize("algorithm", KEYS)
def test_public_keys_of_each_kind_are_taken(algorithm: str) -> None:
    """EdDSA, ES256 and RS256."""
    key = KEYS[algorithm]
    authorizer = Authorizer(
        settings(jwt_secret=None, jwt_algorithms=(algorithm,), jwt_public_key=public(key))
    )
    assert authorizer.verify(signed(key, algorithm), NOW).actor == "ada"
    for other in KEYS.keys() - {algorithm}:
        with pytest.raises(InvalidToken):
            authorizer.verify(signed(KEYS[other], other), NOW)


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_public_key_is_not_taken_for_a_secret(algorithm: str) -> None:
    """Key confusion: HS256, signed with the public key that everybody has."""
    pem = public(KEYS[algorithm])
    body = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(CLAIMS)}"
    mac = hmac.new(pem.encode(), body.encode(), sha256).digest()
    forged = f"{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    authorizer = Authorizer(
        settings(jwt_secret=None, jwt_algorithms=(algorithm,), jwt_public_key=pem)
    )
    with pytest.raises(InvalidToken):
        authorizer.verify(forged, NOW)


def test_audience_and_issuer_are_checked_if_they_are_set() -> None:
    """A token that was made for another service is refused."""
    authorizer = Authorizer(settings(jwt_audience="tags", jwt_issuer="https://issuer"))
    assert authorizer.verify(signed(aud="tags", iss="https://issuer"), NOW)
    for wrong in ({}, {"aud": "other", "iss": "https://issuer"}, {"aud": "tags", "iss": "x"}):
        with pytest.raises(InvalidToken):
            authorizer.verify(signed(**wrong), NOW)
    assert Authorizer(settings()).verify(signed(aud="anything", iss="anyone"), NOW)


@contextmanager
def serving(body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/jwks"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_keys_may_come_from_a_jwk_set() -> None:
    """The token's `kid` names the key; an unknown one is refused; a silent server is no refusal."""
    key = KEYS["ES256"]
    jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    jwk |= {"kid": "one", "use": "sig", "alg": "ES256"}
    by_url = {"jwt_secret": None, "jwt_algorithms": ("ES256",)}
    with serving(json.dumps({"keys": [jwk]}).encode()) as url:
        authorizer = Authorizer(settings(**by_url, jwt_jwks_url=url))
        token = jwt.encode(CLAIMS, key, algorithm="ES256", headers={"kid": "one"})
        assert authorizer.verify(token, NOW).actor == "ada"
        for wrong in ("two", None):
            headers = {"kid": wrong} if wrong else None
            with pytest.raises(InvalidToken):
                authorizer.verify(jwt.encode(CLAIMS, key, "ES256", headers=headers), NOW)
        with pytest.raises(InvalidToken):
            authorizer.verify("garbage", NOW)
    away = Authorizer(settings(**by_url, jwt_jwks_url=url))
    with pytest.raises(JwksUnavailable):
        away.verify(token, NOW)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"keys": []}', b"[]", b"\xff"])
def test_a_jwk_set_that_can_not_be_read_is_not_the_tokens_fault(body: bytes) -> None:
    """The message is tried again later, instead of being refused for good."""
    with serving(body) as url:
        authorizer = Authorizer(
            settings(jwt_secret=None, jwt_algorithms=("ES256",), jwt_jwks_url=url)
        )
        token = jwt.encode(CLAIMS, KEYS["ES256"], algorithm="ES256", headers={"kid": "one"})
        with pytest.raises(JwksUnavailable):
            authorizer.verify(token, NOW)


def test_a_key_that_is_taken_away_is_soon_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verified signature is remembered for five minutes, not for ever."""
    authorizer = Authorizer(settings())
    token = signed()
    authorizer.verify(token, NOW)
    authorizer._key = "another secret of at least 32 bytes"
    assert authorizer.verify(token, NOW)
    later = time.monotonic() + 301
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(InvalidToken):
        authorizer.verify(token, NOW)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"jwt_secret": None}, "TASK_TAGS_JWT_SECRET"),
        ({"jwt_secret": SecretStr("short")}, "TASK_TAGS_JWT_SECRET"),
        ({"jwt_algorithms": ("none",)}, "TASK_TAGS_JWT_ALGORITHMS"),
        ({"jwt_algorithms": ("HS256", "RS256")}, "TASK_TAGS_JWT_ALGORITHMS"),
        ({"jwt_public_key": "x"}, "TASK_TAGS_JWT_ALGORITHMS"),
        ({"jwt_algorithms": ("RS256",)}, "TASK_TAGS_JWT_SECRET"),
        ({"jwt_secret": None, "jwt_algorithms": ("RS256",)}, "TASK_TAGS_JWT_PUBLIC_KEY"),
        (
            {"jwt_secret": None, "jwt_algorithms": ("RS256",), "jwt_public_key": "no key"},
            "TASK_TAGS_JWT_PUBLIC_KEY",
        ),
    ],
)
def test_settings_that_could_accept_a_forgery_are_refused(
    values: dict[str, Any], named: str
) -> None:
    """Each process refuses to start, and names the setting."""
    with pytest.raises(ConfigurationError, match=named):
        Authorizer(settings(**values))


def test_a_minted_token_is_accepted() -> None:
    """`task-tags-admin token` signs what the worker takes."""
    token = sign_token(
        settings(jwt_audience="tags"),
        organization_id=ORGANIZATION,
        actor="ada",
        scopes=SCOPES,
        lifetime=timedelta(hours=1),
    )
    grant = Authorizer(settings(jwt_audience="tags")).verify_now(token)
    assert grant.scopes == set(SCOPES)


def test_a_clock_that_is_wrong_refuses_no_message_for_good() -> None:
    """`exp` counts at acceptance, but not by a clock far ahead; `nbf` counts when it is read."""
    authorizer = Authorizer(settings())
    token = signed(exp=NOW + 300, nbf=NOW)
    hour = 3600
    assert authorizer.verify(token, NOW + hour, NOW + 60)  # Redis' clock is an hour ahead
    assert authorizer.verify(token, NOW - hour, NOW + 60)  # or behind
    assert authorizer.verify(token, NOW + 60, NOW + hour)  # the message waited for an hour
    with pytest.raises(InvalidToken, match="expired"):
        authorizer.verify(token, NOW + hour, NOW + hour)
    with pytest.raises(InvalidToken, match="not valid yet"):
        authorizer.verify(token, NOW, NOW - hour)
    issued = signed(exp=NOW + 300, iat=NOW)
    assert authorizer.verify(issued, NOW, NOW - hour)  # the worker's clock alone is behind
    with pytest.raises(InvalidToken, match="not valid yet"):
        authorizer.verify(issued, NOW - hour, NOW - hour)
