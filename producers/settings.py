"""The settings of producers, with units and defaults; all come from the environment."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Self
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from producers.errors import ConfigurationError
from producers.inbox.protocol import DEFAULT_LIMIT, LEASE_MS, MAX_LEASE_SECONDS
from producers.redis_client import check_redis_url

_MAX_TOKEN_CHARACTERS: Final = 8 * 1024
_FORM: Final = "must be 1 to 8192 of the characters A-Z a-z 0-9 . _ ~ + / = -"
_TOKEN: Final = re.compile(
    r"[A-Za-z0-9._~+/=-]+"
)  # https://www.rfc-editor.org/rfc/rfc6750#section-2.1


class InboxSettings(BaseSettings):
    """The settings that producers, workers and the endpoint share."""

    model_config = SettingsConfigDict(
        env_prefix="TASK_TAGS_",
        extra="ignore",
        hide_input_in_errors=True,
        env_ignore_empty=True,
        use_attribute_docstrings=True,
    )

    redis_url: SecretStr = SecretStr("redis://localhost:6379/0")
    """Redis or Valkey, as `redis://`, `rediss://` or `unix://`: inboxes, Celery queue, channels."""
    inbox_limit: int = Field(DEFAULT_LIMIT, ge=1, le=1_000_000_000)
    """How many messages may wait in an inbox before `InboxFull`, or 429 from the endpoint."""
    lease_seconds: float = Field(LEASE_MS / 1000, ge=1, le=MAX_LEASE_SECONDS)
    """Seconds after which a lease that its drain does not renew expires; then another may start."""

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        try:
            check_redis_url(value.get_secret_value())
        except ValueError as error:  # none of them quotes the URL, which may contain a password
            raise PydanticCustomError("url", "{reason}", {"reason": str(error)}) from None
        return value

    @property
    def lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)

    @classmethod
    def load(cls, **values: Any) -> Self:
        """Read the environment; arguments that are not None take precedence.

        Raises:
            ConfigurationError: Names each variable that is wrong.
        """
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
            lines = [f"TASK_TAGS_{str(each['loc'][0]).upper()}: {each['msg']}" for each in faults]
            raise ConfigurationError("; ".join(lines)) from None


class ProducerSettings(InboxSettings):
    """Settings from variables that begin with TASK_TAGS_, such as TASK_TAGS_REDIS_URL."""

    endpoint_url: str = "http://localhost:8080"
    """The URL of the endpoint, for reading and watching."""
    organization_id: UUID | None = None
    """The organization that messages are enqueued for."""
    token: SecretStr | None = None
    """The bearer token that messages are enqueued under."""

    @field_validator("endpoint_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not is_http_url(value):
            raise PydanticCustomError("url", "must be like http://host:8080")
        return value

    @field_validator("token")
    @classmethod
    def _is_token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        token = _stripped_token(value.get_secret_value())
        if token is None:
            raise PydanticCustomError("token", _FORM)
        return SecretStr(token)

    @property
    def required_organization_id(self) -> UUID:
        """Return the organization, or raise `ConfigurationError`."""
        if self.organization_id is None:
            raise ConfigurationError("TASK_TAGS_ORGANIZATION_ID is not set")
        return self.organization_id

    @property
    def required_token(self) -> str:
        """Return the token, or raise `ConfigurationError`."""
        if self.token is None:
            raise ConfigurationError("TASK_TAGS_TOKEN is not set")
        return self.token.get_secret_value()


def token_source(
    token: str | Callable[[], str] | None, settings: ProducerSettings
) -> Callable[[], str]:
    """Return the function that gives the token: the caller's, or one for that of the settings.

    Raises `ConfigurationError` if there is none; so does the function if the caller's returns
    something else than a token.
    """
    if not callable(token):
        fixed = settings.required_token
        return lambda: fixed

    def checked() -> str:
        stripped = _stripped_token(token())
        if stripped is None:
            raise ConfigurationError(f"the result of the function for the token {_FORM}")
        return stripped

    return checked


def _stripped_token(token: object) -> str | None:
    """Return a token without the white space around it; None if it has the form of no token."""
    stripped = token.strip() if isinstance(token, str) else ""
    known = len(stripped) <= _MAX_TOKEN_CHARACTERS and _TOKEN.fullmatch(stripped)
    return stripped if known else None


def check_timeout(timeout: object) -> None:
    """Raise `ValueError` unless it is a number of seconds, 0 or more, or None."""
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and timeout >= 0):  # type: ignore[operator]
        raise ValueError("timeout must be a number of seconds, 0 or more, or None")


def is_http_url(text: str) -> bool:
    """Return whether a text is the URL of an HTTP server."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        return bool(known) and text.isprintable() and " " not in text
    except ValueError:
        return False


load_settings = ProducerSettings.load
