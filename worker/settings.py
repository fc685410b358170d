"""The settings of worker and endpoint, with units and defaults; all come from the environment."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Annotated, Any, Final

from psycopg import ProgrammingError
from psycopg.conninfo import make_conninfo
from pydantic import Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from producers.settings import InboxSettings, is_http_url

ALGORITHMS: Final = (
    *("HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES256K", "ES384", "ES512", "EdDSA"),
)
_MAX_DAYS: Final = 36_500
_MIN_DAYS: Final = 0.001


class Settings(InboxSettings):
    """Settings from variables that begin with TASK_TAGS_, such as TASK_TAGS_DATABASE_URL."""

    database_url: SecretStr = SecretStr("postgresql://localhost/task_tags")
    """The URL of PostgreSQL, with the role to connect as."""

    jwt_algorithms: Annotated[tuple[str, ...], NoDecode] = ("HS256",)
    """The signature algorithms that tokens may use, separated by commas; all of one family."""
    jwt_secret: SecretStr | None = None
    """The secret for HS256, HS384 or HS512: at least 32 bytes."""
    jwt_previous_secret: SecretStr | None = None
    """A second secret that tokens may be signed with, while secrets are rotated."""
    jwt_public_key: str | None = None
    """The public key in PEM for EdDSA, ES256, RS256 and the like."""
    jwt_jwks_url: str | None = None
    """The URL of a JWK set with the public keys."""
    jwt_audience: str | None = None
    """The `aud` that tokens must have; required with public keys, otherwise optional."""
    jwt_issuer: str | None = None
    """The `iss` that tokens must have; required with public keys, otherwise optional."""

    group_size: int = Field(100, ge=1, le=1000)
    """The maximum number of messages that are applied in one transaction."""
    transaction_seconds: float = Field(30, ge=1, le=3600)
    """Seconds after which a transaction is aborted and its connection closed. The limits of its
    role hold as well: 30 s for a statement and 60 s for a transaction, as it is migrated."""
    drain_budget_seconds: float = Field(0.25, ge=0.001, le=60)
    """Seconds until a drain goes to the end of the queue, behind other organizations' drains."""
    retention_days: float = Field(30, ge=_MIN_DAYS, le=_MAX_DAYS)
    """Days for which a result is stored. During this time, a batch never takes effect twice."""
    changes_retention_days: float | None = Field(None, ge=_MIN_DAYS, le=_MAX_DAYS)
    """Days for which a change event is stored; if not set, events are never deleted."""
    endpoint_connections: int = Field(4, ge=1, le=1000)
    """The number of database connections of one endpoint process."""
    log_level: str = "INFO"
    """The minimum level of log records. Logs are JSON, one object per line."""

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr) -> SecretStr:
        try:
            url = make_url(value.get_secret_value())
            known = url.get_backend_name() in ("postgresql", "postgres")
            options = connect_arguments(value.get_secret_value())
            known = known and not any(isinstance(each, tuple) for each in options.values())
            make_conninfo(**{name: str(each) for name, each in options.items()})
        except ProgrammingError as error:  # of an option; it quotes the name alone
            raise PydanticCustomError("url", "{reason}", {"reason": str(error).strip()}) from None
        except (ArgumentError, ValueError):
            known = False
        if not known or not 0 < (url.port or 5432) < 65536:
            raise PydanticCustomError(
                "url", "must be like postgresql://user:password@host/database"
            )
        return value

    @field_validator("log_level")
    @classmethod
    def _is_level(cls, value: str) -> str:
        if value.upper() not in logging.getLevelNamesMapping():
            raise PydanticCustomError("level", "must be DEBUG, INFO, WARNING, ERROR or CRITICAL")
        return value.upper()

    @field_validator("jwt_algorithms", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.replace(" ", "").split(",")) if isinstance(value, str) else value

    @field_validator("jwt_algorithms")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - set(ALGORITHMS):
            words = {
                "unknown": ", ".join(map(ascii, sorted(unknown))),
                "known": ", ".join(ALGORITHMS),
            }
            raise PydanticCustomError("algorithm", "{unknown} is not one of {known}", words)
        return value

    @field_validator("jwt_jwks_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not is_http_url(value):
            raise PydanticCustomError("url", "must be like https://host/jwks.json")
        return value

    @field_validator(
        *("jwt_secret", "jwt_previous_secret", "jwt_public_key", "jwt_audience", "jwt_issuer")
    )
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        try:
            known = text is None or bool(text.encode().strip())
        except UnicodeEncodeError:
            known = False
        if not known:
            raise PydanticCustomError("text", "must be UTF-8 text that is not blank")
        return value

    @property
    def retention(self) -> timedelta:
        return timedelta(days=self.retention_days)

    @property
    def changes_retention(self) -> timedelta | None:
        days = self.changes_retention_days
        return None if days is None else timedelta(days=days)


load_settings = Settings.load


def driver_url(database_url: str) -> Any:
    """Return the URL with psycopg 3 as its driver, however `postgresql://` was written."""
    return make_url(database_url).set(drivername="postgresql+psycopg")


def connect_arguments(database_url: str) -> dict[str, Any]:
    """Return psycopg's arguments for a URL, as SQLAlchemy reads it.

    The URL that SQLAlchemy writes has + for a space.
    """
    url = driver_url(database_url)
    _, arguments = url.get_dialect()().create_connect_args(url)
    return dict(arguments)
