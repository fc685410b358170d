"""The settings of producers, with units and defaults; all come from the environment."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from producers.errors import ConfigurationError
from producers.inbox.protocol import DEFAULT_LIMIT, LEASE_MS, MAX_LEASE_SECONDS


def check_redis_url(value: SecretStr) -> SecretStr:
    """Return a Redis URL, or raise an error that does not quote it: it may contain a password."""
    url = value.get_secret_value()
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("redis", "rediss", "unix") and bool(parts.netloc or parts.path)
        _ = parts.port
    except ValueError:
        known = False
    if not known:
        raise PydanticCustomError("url", "must be like redis://host:6379/0 or unix:///path?db=0")
    return value


class ProducerSettings(BaseSettings):
    """Settings from variables that begin with TASK_TAGS_, such as TASK_TAGS_REDIS_URL."""

    model_config = SettingsConfigDict(
        env_prefix="TASK_TAGS_", extra="ignore", hide_input_in_errors=True, env_ignore_empty=True
    )

    redis_url: SecretStr = SecretStr("redis://localhost:6379/0")
    """Redis or Valkey, as `redis://`, `rediss://` or `unix://`."""
    endpoint_url: str = "http://localhost:8080"
    """The URL of the endpoint, for reading and watching."""
    organization_id: UUID | None = None
    """The organization that messages are enqueued for."""
    token: SecretStr | None = None
    """The bearer token that messages are enqueued under."""
    inbox_limit: int = Field(DEFAULT_LIMIT, ge=1)
    """How many messages may wait in the inbox before `InboxFull`."""
    lease_seconds: float = Field(LEASE_MS / 1000, ge=1, le=MAX_LEASE_SECONDS)
    """Seconds until a lease expires that is not renewed; the same as the workers' setting."""

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        return check_redis_url(value)

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


def load_settings(**values: Any) -> ProducerSettings:
    """Read the environment; arguments that are not None take precedence.

    Raises:
        ConfigurationError: Names each variable that is wrong.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return ProducerSettings(**given)
    except ValidationError as error:
        faults = [
            f"TASK_TAGS_{str(fault['loc'][0]).upper()}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigurationError("; ".join(faults)) from None
