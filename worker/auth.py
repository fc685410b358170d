"""Verifies tokens (docs/concepts/contract.md#tokens).

Keys and algorithms come from the settings, never from a token: the `kid` in its header chooses only
among the keys of the configured JWK set. Tokens are neither stored nor logged; verified ones are
remembered by their hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Final
from uuid import UUID

import jwt
from jwt.utils import base64url_decode
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from producers.contract.encoding import each_name_once
from producers.contract.values import Id
from producers.errors import ConfigurationError
from worker.jwk_set import JwkSet, JwksUnavailable
from worker.settings import Settings

READ: Final = "task-tags:read"
WRITE: Final = "task-tags:write"
EXECUTIONS_WRITE: Final = "flow-executions:write"
SCOPES: Final = (READ, WRITE, EXECUTIONS_WRITE)

LEEWAY_SECONDS: Final = 30
_MAX_AHEAD_SECONDS: Final = 60
MAX_TOKEN_BYTES: Final = 8 * 1024
_MIN_SECRET_BYTES: Final = 32
_REMEMBERED: Final = 10_000
_REMEMBERED_SECONDS: Final = 300.0
_FIRST_KEYS_SECONDS: Final = 0.5
_FETCH_SECONDS: Final = 5.0
_MAX_TIME: Final = 253_402_300_799
"""The end of the year 9999, in seconds since the epoch."""
_SYMMETRIC: Final = {"HS": True, "RS": False, "PS": False, "ES": False, "Ed": False}
_WRONG_CLAIMS: Final = {
    "sub": "the token's sub must have 1 to 200 characters, no control or bidirectional ones, and "
    "not begin with task-tags:",
    "org": "the token's org must be a UUID",
}


class InvalidToken(Exception):
    """The token is missing, malformed, wrongly signed, expired or not valid yet."""


def _scopes(claim: object) -> object:
    """Return the scopes of a claim that is a list, or one string with spaces.

    The second form is that of https://www.rfc-editor.org/rfc/rfc8693#section-4.2.
    """
    return [each for each in claim.split(" ") if each] if isinstance(claim, str) else claim


_ACTOR: Final = (
    r"\A(?!task-tags:)[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]*\Z"
)
_MAX_ACTOR: Final = 200
_COMPACT: Final = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_TYPES: Final = (None, "jwt", "at+jwt")
NumericDate = Annotated[float, Field(strict=True, ge=0, le=_MAX_TIME)]
"""Seconds since the epoch (https://www.rfc-editor.org/rfc/rfc7519#section-2)."""


class Principal(BaseModel):
    """What a token's claims prove: organization, actor, scopes and the time of validity."""

    model_config = ConfigDict(
        frozen=True, hide_input_in_errors=True, allow_inf_nan=False, regex_engine="python-re"
    )

    actor: Annotated[str, Field(alias="sub", min_length=1, max_length=_MAX_ACTOR, pattern=_ACTOR)]
    organization_id: Id = Field(alias="org")
    scopes: Annotated[list[str], BeforeValidator(_scopes)] = Field([], alias="scope")
    not_before: NumericDate = Field(0, alias="nbf")
    issued_at: NumericDate = Field(0, alias="iat")
    expires_at: NumericDate = Field(alias="exp")

    def allows(self, scope: str) -> bool:
        return scope in self.scopes


class Authorizer:
    """Verifies tokens: the signature once in 5 minutes, the time of validity at every use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._algorithms = list(settings.jwt_algorithms)
        self._keys, self._jwks = _key_source(settings)
        self._keys_version = 0
        self._grants: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()
        self._unknown: OrderedDict[tuple[bytes, float], float] = OrderedDict()

    def fetch_keys(self) -> None:
        """Wait up to 5 s for the first JWK set, if there is one."""
        if self._jwks is not None:
            with suppress(JwksUnavailable):
                self._jwks.key(None, _FETCH_SECONDS)

    def verify(self, token: str | bytes | None, at: float, now: float | None = None) -> Principal:
        """Return what a token proves at a given time.

        Args:
            at: When the message was accepted, by Redis' clock, in seconds since the epoch: `exp` is
                compared with it, unless it is more than 60 s ahead of `now`. The leeway is 30 s.
            now: The time by this process' clock, with which `nbf` is compared; `at` by default.
                `iat` must be past by one of both.

        Raises:
            InvalidToken: The token is not valid at that time.
            JwksUnavailable: The keys can't be fetched, or the token's key is unknown, and the keys
                were not fetched since the message was first seen.
        """
        return self._verify(token, at, at if now is None else now, is_message=True)

    def verify_now(self, token: str) -> Principal:
        """Return what a token proves now. Raises what `verify` raises, but does not wait for keys.

        An unknown key is `InvalidToken`; the keys are fetched in the background.
        """
        now = time.time()
        return self._verify(token, now, now, is_message=False)

    def _verify(
        self, token: str | bytes | None, at: float, now: float, *, is_message: bool
    ) -> Principal:
        if not token:
            raise InvalidToken("a token is required")
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidToken("the token is too long")
        raw = token.encode(errors="replace") if isinstance(token, str) else token
        grant = self._remembered(hashlib.sha256(raw).digest(), raw, at if is_message else None)
        used_at = now if at > now + _MAX_AHEAD_SECONDS else at
        if used_at > grant.expires_at + LEEWAY_SECONDS:
            raise InvalidToken("the token has expired")
        # Refused only if `iat` is in the future by both clocks: one of them may be behind.
        is_early = max(now, at) < grant.issued_at - LEEWAY_SECONDS
        if is_early or now < grant.not_before - LEEWAY_SECONDS:
            raise InvalidToken("the token is not valid yet")
        return grant

    def _remembered(self, digest: bytes, raw: bytes, accepted_at: float | None) -> Principal:
        """Return what a token proves; verify it unless that was done in the last 5 minutes.

        It is verified again, so that tokens end soon after their key is removed from the JWK set.
        """
        now = time.monotonic()
        if self._jwks is not None and self._jwks.version != self._keys_version:
            self._keys_version = self._jwks.version
            self._grants.clear()
        grant, until = self._grants.get(digest, (None, now))
        if grant is None or now >= until:
            grant = self._verified(raw, self._signing_keys(digest, raw, accepted_at))
            _remember(self._grants, digest, (grant, now + _REMEMBERED_SECONDS))
        return grant

    def _verified(self, raw: bytes, keys: Sequence[Any]) -> Principal:
        try:
            if _COMPACT.fullmatch(raw) is None:
                raise InvalidToken("the token is not valid")
            claims = self._claims(raw, keys)
            for part in raw.split(b".")[:2]:
                json.loads(base64url_decode(part), object_pairs_hook=each_name_once)
            return Principal.model_validate(claims)
        except ValidationError as error:
            wrong = str(error.errors()[0]["loc"][0])
            text = _WRONG_CLAIMS.get(wrong, "the token's claims have wrong types")
            raise InvalidToken(text) from None
        except jwt.MissingRequiredClaimError as error:
            raise InvalidToken(f"the token has no {error.claim}") from None
        except jwt.InvalidAudienceError:
            raise InvalidToken("the token is for another audience") from None
        except jwt.InvalidIssuerError:
            raise InvalidToken("the token is of another issuer") from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise InvalidToken("the token is not valid") from None

    def _claims(self, raw: bytes, keys: Sequence[Any]) -> Any:
        """Return the claims of a token that one of the keys has signed. Raises `PyJWTError`."""
        for place, key in enumerate(keys, 1):
            try:
                token = jwt.decode_complete(
                    raw,
                    key,
                    algorithms=self._algorithms,
                    audience=self._settings.jwt_audience,
                    issuer=self._settings.jwt_issuer,
                    options={
                        "require": ["exp", "sub", "org"],
                        "verify_aud": self._settings.jwt_audience is not None,
                        # `verify` compares these with the time at which the message was accepted.
                        "verify_exp": False,
                        "verify_nbf": False,
                        "verify_iat": False,
                    },
                )
            except jwt.InvalidSignatureError:
                if place == len(keys):
                    raise
            else:
                kind = token["header"].get("typ")
                if isinstance(kind, str):
                    kind = kind.lower().removeprefix("application/")
                if kind not in _TYPES:
                    raise InvalidToken("the token is of another type")
                return token["payload"]
        raise InvalidToken("the token is signed with an unknown key")

    def _signing_keys(self, digest: bytes, raw: bytes, accepted_at: float | None) -> Sequence[Any]:
        """Return the keys that may have signed a token; none if its key is unknown.

        The key of a message may have been published since the set was fetched: it waits until the
        set is fetched again. The age of the set is measured by
        a clock that is never set.
        """
        if self._jwks is None:
            return self._keys
        try:
            kid = jwt.get_unverified_header(raw).get("kid")
        except (jwt.PyJWTError, ValueError, RecursionError):
            return []
        wait = 0 if accepted_at is None else _FIRST_KEYS_SECONDS
        key = self._jwks.key(kid, wait)
        if key is not None:
            return [key]
        if accepted_at is not None:
            message = digest, accepted_at
            seen_at = self._unknown.get(message, time.monotonic())
            if self._jwks.fetched_at <= seen_at:
                _remember(self._unknown, message, seen_at)
                raise JwksUnavailable("the token's key is unknown; the JWK set is fetched again")
        return []


def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)


def _key_source(settings: Settings) -> tuple[Sequence[Any], JwkSet | None]:
    """Return the configured keys, or the JWK set. Raises `ConfigurationError`."""
    symmetric = {_SYMMETRIC.get(algorithm[:2]) for algorithm in settings.jwt_algorithms}
    if symmetric not in ({True}, {False}):
        raise ConfigurationError(
            "TASK_TAGS_JWT_ALGORITHMS: must be only HS… algorithms, or only RS…, PS…, ES… and EdDSA"
        )
    given = {
        "TASK_TAGS_JWT_SECRET": settings.jwt_secret,
        "TASK_TAGS_JWT_PREVIOUS_SECRET": settings.jwt_previous_secret,
    }
    secrets = {name: each.get_secret_value() for name, each in given.items() if each is not None}
    if symmetric == {False}:
        for name in secrets:
            raise ConfigurationError(f"{name}: is only for HS… algorithms")
        return _public_keys(settings)
    if settings.jwt_public_key or settings.jwt_jwks_url:
        raise ConfigurationError(
            "TASK_TAGS_JWT_ALGORITHMS: HS… algorithms take a secret, not a key"
        )
    for name, secret in {"TASK_TAGS_JWT_SECRET": "", **secrets}.items():
        if len(secret.encode()) < _MIN_SECRET_BYTES:
            raise ConfigurationError(f"{name}: at least {_MIN_SECRET_BYTES} bytes are required")
    return list(secrets.values()), None


def _public_keys(settings: Settings) -> tuple[Sequence[Any], JwkSet | None]:
    if bool(settings.jwt_public_key) == bool(settings.jwt_jwks_url):
        raise ConfigurationError(
            "TASK_TAGS_JWT_PUBLIC_KEY or TASK_TAGS_JWT_JWKS_URL: one of them is required"
        )
    # The issuer signs for other services with the same key.
    for name in ("audience", "issuer"):
        if not getattr(settings, f"jwt_{name}"):
            text = "is required with public keys: their issuer also signs tokens for other services"
            raise ConfigurationError(f"TASK_TAGS_JWT_{name.upper()}: {text}")
    if settings.jwt_jwks_url:
        return [], JwkSet(settings.jwt_jwks_url, settings.jwt_algorithms)
    try:
        for algorithm in settings.jwt_algorithms:
            jwt.get_algorithm_by_name(algorithm).prepare_key(settings.jwt_public_key)
    except (jwt.PyJWTError, NotImplementedError, ValueError, TypeError):
        raise ConfigurationError("TASK_TAGS_JWT_PUBLIC_KEY: is not a public key in PEM") from None
    return [settings.jwt_public_key], None


def is_actor(text: str) -> bool:
    """Return whether a text may be the `sub` of a token."""
    return 0 < len(text) <= _MAX_ACTOR and re.match(_ACTOR, text) is not None


def sign_token(
    settings: Settings,
    *,
    organization_id: UUID,
    actor: str,
    scopes: tuple[str, ...],
    lifetime: timedelta,
) -> str:
    """Sign a token with the configured secret, for development. Raises `ConfigurationError`."""
    keys, _ = _key_source(settings)
    if not settings.jwt_algorithms[0].startswith("HS"):
        raise ConfigurationError(
            "TASK_TAGS_JWT_ALGORITHMS: only a shared secret can sign a token here"
        )
    now = datetime.now(timezone.utc)
    claims = {
        "sub": actor,
        "org": str(organization_id),
        "scope": " ".join(scopes),
        "iat": now,
        "exp": now + lifetime,
        **({"aud": settings.jwt_audience} if settings.jwt_audience else {}),
        **({"iss": settings.jwt_issuer} if settings.jwt_issuer else {}),
    }
    return jwt.encode(claims, keys[0], algorithm=settings.jwt_algorithms[0])
