"""Tokens (docs/concepts/contract.md#tokens): what each key accepts, and every wrong token."""

from __future__ import annotations

import base64
import hmac
import json
import time
from datetime import timedelta
from hashlib import sha256
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from pydantic import SecretStr

from producers.errors import ConfigurationError
from tests.support.keys import (
    AUDIENCE,
    CLAIMS,
    KEYS,
    MADE_FOR_US,
    NOW,
    ORGANIZATION,
    SECRET,
    part,
    settings,
)
from worker.auth import SCOPES, WRITE, Authorizer, InvalidToken, sign_token


def public(key: Any) -> str:
    encoded: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded.decode()


def signed(key: Any = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    given = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not ...}
    return jwt.encode(given, key, algorithm=algorithm)


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


def with_parts(head: str, payload: str) -> str:
    parts = [base64.urlsafe_b64encode(each.encode()).rstrip(b"=") for each in (head, payload)]
    signature = hmac.new(SECRET.encode(), b".".join(parts), sha256).digest()
    encoded = base64.urlsafe_b64encode(signature).rstrip(b"=")
    return b".".join((*parts, encoded)).decode()


def doubled(claim: str) -> str:
    """Return a token with a claim twice, of which the last one would count."""
    first = json.dumps({claim: "nonsense"})[:-1]
    return with_parts(json.dumps({"alg": "HS256"}), f"{first}, {json.dumps(CLAIMS)[1:]}")


def of_type(kind: object) -> str:
    return with_parts(json.dumps({"alg": "HS256", "typ": kind}), json.dumps(CLAIMS))


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
        signed(scope={"task-tags:read": True}),
        signed(scope=[["task-tags:read"]]),
        signed(exp=True),
        signed(exp=1e308),
        signed(exp=-1),
        signed(exp=str(int(NOW) + 60)),
        signed(nbf=str(int(NOW))),
        signed(nbf=False),
        signed(iat=str(int(NOW))),
        signed(iat=True),
        signed(sub="a\u202eb"),
        signed(sub="a\nb"),
        signed(sub="task-tags:worker"),
        signed(sub=5),
        signed() + "=",
        signed() + "\n",
        " " + signed(),
        doubled("org"),
        doubled("exp"),
        of_type("logout+jwt"),
        of_type("application/secevent+jwt"),
        of_type(5),
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


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+jwt", None])
def test_access_tokens_are_taken_whatever_they_call_themselves(kind: str | None) -> None:
    """RFC 7519, 5.1 and RFC 9068, 2.1."""
    assert Authorizer(settings()).verify(of_type(kind), NOW).actor == "ada"


def test_scopes_are_separated_by_spaces_alone() -> None:
    """RFC 8693, 4.2: a tab is part of a scope's name."""
    grant = Authorizer(settings()).verify(signed(scope="a\ttask-tags:write  task-tags:read "), NOW)
    assert grant.scopes == ["a\ttask-tags:write", "task-tags:read"]


def test_two_secrets_are_valid_while_they_are_rotated() -> None:
    """Tokens of the new and of the previous one are taken, and no others."""
    old = "the previous secret, of at least 32 bytes"
    authorizer = Authorizer(settings(jwt_previous_secret=SecretStr(old)))
    for secret in (SECRET, old):
        assert authorizer.verify(signed(secret), NOW).actor == "ada"
    with pytest.raises(InvalidToken):
        authorizer.verify(signed("another secret of at least 32 bytes"), NOW)


@pytest.mark.parametrize("algorithm", KEYS)
def test_public_keys_of_each_kind_are_taken(algorithm: str) -> None:
    """EdDSA, ES256 and RS256."""
    key = KEYS[algorithm]
    authorizer = Authorizer(
        settings(
            jwt_secret=None, jwt_algorithms=(algorithm,), jwt_public_key=public(key), **AUDIENCE
        )
    )
    assert authorizer.verify(signed(key, algorithm, **MADE_FOR_US), NOW).actor == "ada"
    for other in KEYS.keys() - {algorithm}:
        with pytest.raises(InvalidToken):
            authorizer.verify(signed(KEYS[other], other, **MADE_FOR_US), NOW)


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_public_key_is_not_taken_for_a_secret(algorithm: str) -> None:
    """Key confusion: HS256, signed with the public key that everybody has."""
    pem = public(KEYS[algorithm])
    body = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(CLAIMS | MADE_FOR_US)}"
    mac = hmac.new(pem.encode(), body.encode(), sha256).digest()
    forged = f"{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    authorizer = Authorizer(
        settings(jwt_secret=None, jwt_algorithms=(algorithm,), jwt_public_key=pem, **AUDIENCE)
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


def test_a_key_that_is_taken_away_is_soon_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verified signature is remembered for five minutes, not for ever."""
    authorizer = Authorizer(settings())
    token = signed()
    authorizer.verify(token, NOW)
    authorizer._keys = ["another secret of at least 32 bytes"]
    assert authorizer.verify(token, NOW)
    later = time.monotonic() + 301
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(InvalidToken):
        authorizer.verify(token, NOW)


ASYMMETRIC = {
    "jwt_secret": None,
    "jwt_algorithms": ("RS256",),
    "jwt_public_key": "no key",
    **AUDIENCE,
}


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"jwt_secret": None}, "TASK_TAGS_JWT_SECRET"),
        ({"jwt_secret": SecretStr("short")}, "TASK_TAGS_JWT_SECRET"),
        ({"jwt_algorithms": ("none",)}, "TASK_TAGS_JWT_ALGORITHMS"),
        ({"jwt_algorithms": ("HS256", "RS256")}, "TASK_TAGS_JWT_ALGORITHMS"),
        ({"jwt_public_key": "x"}, "TASK_TAGS_JWT_ALGORITHMS"),
        ({"jwt_algorithms": ("RS256",)}, "TASK_TAGS_JWT_SECRET"),
        ({"jwt_secret": None, "jwt_algorithms": ("RS256",)}, "TASK_TAGS_JWT_PUBLIC_KEY"),
        ({"jwt_previous_secret": SecretStr("short")}, "TASK_TAGS_JWT_PREVIOUS_SECRET"),
        (ASYMMETRIC | {"jwt_audience": None}, "TASK_TAGS_JWT_AUDIENCE"),
        (ASYMMETRIC | {"jwt_issuer": ""}, "TASK_TAGS_JWT_ISSUER"),
        (
            ASYMMETRIC,
            "TASK_TAGS_JWT_PUBLIC_KEY",
        ),
    ],
)
def test_settings_that_could_accept_a_forgery_are_refused(
    values: dict[str, Any], setting: str
) -> None:
    """Each process refuses to start, and names the setting."""
    with pytest.raises(ConfigurationError, match=setting):
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
    assert grant.scopes == list(SCOPES)


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
