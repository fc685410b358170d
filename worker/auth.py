"""Verifies tokens (docs/concepts/contract.md#tokens). The only module that knows JWTs.

Keys and algorithms come from the settings, never from a token: the `kid` in its header chooses only
among the keys of the configured JWK set. Tokens are neither stored nor logged; verified ones are
remembered by their hash.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Final
from uuid import UUID

import jwt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from producers.contract.values import Id
from producers.errors import ConfigurationError
from worker.settings import Settings

READ: Final = "task-tags:read"
WRITE: Final = "task-tags:write"
EXECUTIONS_WRITE: Final = "flow-executions:write"
SCOPES: Final = (READ, WRITE, EXECUTIONS_WRITE)

LEEWAY_SECONDS: Final = 30
_MAX_AHEAD_SECONDS: Final = 60
MAX_TOKEN_BYTES: Final = 8 * 1024
_REMEMBERED: Final = 10_000
_REMEMBERED_SECONDS: Final = 300.0
_JWKS_SECONDS: Final = 300
_SYMMETRIC: Final = {"HS": True, "RS": False, "PS": False, "ES": False, "Ed": False}
_WRONG_CLAIMS: Final = {
    "sub": "the token's sub must have 1 to 200 characters",
    "org": "the token's org must be a UUID",
}


class InvalidToken(Exception):
    """The token is missing, malformed, wrongly signed, expired or not valid yet."""


class JwksUnavailable(Exception):
    """The JWK set can't be fetched at present. The token may be valid: try again later."""


def _scopes(claim: object) -> object:
    """Return the scopes of a claim that is a list, or one string with spaces."""
    return claim.split() if isinstance(claim, str) else claim


class Principal(BaseModel):
    """What a token's claims prove: organization, actor, scopes and the time of validity."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    actor: Annotated[str, Field(alias="sub", min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
    organization_id: Id = Field(alias="org")
    scopes: Annotated[frozenset[Any], BeforeValidator(_scopes)] = Field(frozenset(), alias="scope")
    not_before: float = Field(0, alias="nbf")
    issued_at: float = Field(0, alias="iat")
    """Seconds since the epoch."""
    expires_at: float = Field(alias="exp")
    """Seconds since the epoch."""

    def allows(self, scope: str) -> bool:
        return scope in self.scopes


class Authorizer:
    """Verifies tokens: the signature once in 5 minutes, the time of validity at every use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._algorithms = list(settings.jwt_algorithms)
        self._key, self._jwks = _key_source(settings)
        self._grants: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    def verify(self, token: str | bytes | None, at: float, now: float | None = None) -> Principal:
        """Return what a token proves at a given time.

        Args:
            at: When the message was accepted, by Redis' clock, in seconds since the epoch: `exp` is
                compared with it, unless it is more than 60 s ahead of `now`. The leeway is 30 s.
            now: The time by this process' clock, with which `nbf` is compared; `at` by default.
                `iat` must be past by one of both.

        Raises:
            InvalidToken: The token is not valid at that time.
            JwksUnavailable: The keys can't be fetched.
        """
        if not token:
            raise InvalidToken("a token is required")
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidToken("the token is too long")
        raw = token.encode(errors="replace") if isinstance(token, str) else token
        grant = self._remembered(hashlib.sha256(raw).digest(), raw)
        now = at if now is None else now
        used_at = now if at > now + _MAX_AHEAD_SECONDS else at
        if used_at > grant.expires_at + LEEWAY_SECONDS:
            raise InvalidToken("the token has expired")
        # By both clocks issued in the future: one of them alone may be behind.
        is_early = max(now, at) < grant.issued_at - LEEWAY_SECONDS
        if is_early or now < grant.not_before - LEEWAY_SECONDS:
            raise InvalidToken("the token is not valid yet")
        return grant

    def verify_now(self, token: str) -> Principal:
        """Return what a token proves now. Raises what `verify` raises."""
        return self.verify(token, at=time.time())

    @property
    def may_block(self) -> bool:
        """Whether verifying may wait for a JWK set to be fetched."""
        return self._jwks is not None

    def _remembered(self, digest: bytes, raw: bytes) -> Principal:
        """Return what a token proves; verify it unless that was done in the last 5 minutes.

        It is verified again, so that tokens end soon after their key is removed from the JWK set.
        """
        now = time.monotonic()
        grant, until = self._grants.get(digest, (None, now))
        if grant is None or now >= until:
            grant = self._verified(raw)
            self._grants[digest] = grant, now + _REMEMBERED_SECONDS
            if len(self._grants) > _REMEMBERED:
                self._grants.popitem(last=False)
        return grant

    def _verified(self, raw: bytes) -> Principal:
        try:
            claims = jwt.decode(
                raw.decode("ascii"),
                self._signing_key(raw),
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
        except (jwt.InvalidTokenError, ValueError, TypeError, RecursionError):
            raise InvalidToken("the token is not valid") from None

    def _signing_key(self, raw: bytes) -> Any:
        if self._jwks is None:
            return self._key
        kid = jwt.get_unverified_header(raw).get("kid", "")
        try:
            for refresh in (False, True):
                if found := self._jwks.match_kid(self._jwks.get_signing_keys(refresh), kid):
                    return found.key
        except (jwt.PyJWTError, OSError, ValueError) as error:
            raise JwksUnavailable("the JWK set can't be fetched") from error
        raise InvalidToken("the token is signed with an unknown key")


def _key_source(settings: Settings) -> tuple[Any, jwt.PyJWKClient | None]:
    """Return the configured key, or the client of the JWK set. Raises `ConfigurationError`."""
    symmetric = {_SYMMETRIC.get(algorithm[:2]) for algorithm in settings.jwt_algorithms}
    if symmetric not in ({True}, {False}):
        raise ConfigurationError(
            "TASK_TAGS_JWT_ALGORITHMS: must be HS… algorithms alone, or RS…, PS…, ES… and EdDSA"
        )
    secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret else None
    if symmetric == {True}:
        if settings.jwt_public_key or settings.jwt_jwks_url:
            raise ConfigurationError(
                "TASK_TAGS_JWT_ALGORITHMS: HS… algorithms take a secret, not a key"
            )
        if secret is None or len(secret.encode()) < 32:
            raise ConfigurationError("TASK_TAGS_JWT_SECRET: at least 32 bytes are required")
        return secret, None
    if secret is not None:
        raise ConfigurationError("TASK_TAGS_JWT_SECRET: is for HS… algorithms alone")
    if bool(settings.jwt_public_key) == bool(settings.jwt_jwks_url):
        raise ConfigurationError(
            "TASK_TAGS_JWT_PUBLIC_KEY or TASK_TAGS_JWT_JWKS_URL: one of them is required"
        )
    if settings.jwt_jwks_url:
        return None, jwt.PyJWKClient(settings.jwt_jwks_url, timeout=5, lifespan=_JWKS_SECONDS)
    try:
        for algorithm in settings.jwt_algorithms:
            jwt.get_algorithm_by_name(algorithm).prepare_key(settings.jwt_public_key)
    except (jwt.PyJWTError, NotImplementedError, ValueError, TypeError):
        raise ConfigurationError("TASK_TAGS_JWT_PUBLIC_KEY: is no public key in PEM") from None
    return settings.jwt_public_key, None


def sign_token(
    settings: Settings,
    *,
    organization_id: UUID,
    actor: str,
    scopes: tuple[str, ...],
    lifetime: timedelta,
) -> str:
    """Sign a token with the configured secret, for development. Raises `ConfigurationError`."""
    key, _ = _key_source(settings)
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
    return jwt.encode(claims, key, algorithm=settings.jwt_algorithms[0])
