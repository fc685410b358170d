"""Every setting is tried with values that people get wrong: it works, or one line names it."""

from __future__ import annotations

import pytest

from producers.errors import ConfigurationError
from producers.settings import ProducerSettings
from worker.auth import Authorizer
from worker.settings import Settings

VALUES = {
    "empty": "",
    "blank": " \t ",
    "huge": "9" * 10_000,
    "beyond a double": "1e400",
    "large": "1e10",
    "infinite": "inf",
    "not a number": "nan",
    "negative": "-1",
    "zero": "0",
    "non-ASCII digits": "٣",
    "not UTF-8": "\udcff" * 32,
    "non-ASCII port": "http://localhost:٨٠",
    "huge port": "postgresql://localhost:99999/x",
    "URL without a host": "http://",
}
FIELDS = [(model, name) for model in (ProducerSettings, Settings) for name in model.model_fields]
TEXTS = {"jwt_audience", "jwt_issuer", "jwt_secret", "jwt_previous_secret", "token"}
"""Settings of which a text of any kind may be right."""


def load(model: type[ProducerSettings | Settings]) -> ProducerSettings | Settings | str:
    """Return the settings, after all that a process makes of them as it starts; or the error."""
    try:
        settings = model.load()
        if isinstance(settings, Settings):
            Authorizer(settings)
        return settings
    except ConfigurationError as error:
        return str(error)


@pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))
@pytest.mark.parametrize(
    ("model", "name"), FIELDS, ids=[f"{model.__name__}-{name}" for model, name in FIELDS]
)
def test_a_wrong_value_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, model: type[ProducerSettings | Settings], name: str, value: str
) -> None:
    """Or it is taken, because it is empty, a text, or a number within its bounds."""
    variable = f"TASK_TAGS_{name.upper()}"
    monkeypatch.setenv("TASK_TAGS_JWT_SECRET", "s" * 32)
    monkeypatch.setenv(variable, value)
    settings = load(model)
    if isinstance(settings, str):
        assert variable in settings or "TASK_TAGS_JWT_ALGORITHMS: HS… algorithms take" in settings
        assert "\n" not in settings
        return
    given = getattr(settings, name)
    assert value == "" or name in TEXTS or isinstance(given, int | float)
    assert value != VALUES["not UTF-8"]
    assert not isinstance(given, int | float) or 0 < given <= 1_000_000_000
    assert settings.lease_ms >= 1000
    if isinstance(settings, Settings):
        assert settings.retention.total_seconds() > 60
        assert settings.changes_retention is None


@pytest.mark.parametrize("wrong", ["a b", "é", "x" * 8193, "Bearer x"])
def test_a_token_of_another_form_is_refused_and_not_quoted(wrong: str) -> None:
    """It would end in the header of a request; one with a line break at its end is cut there."""
    with pytest.raises(ConfigurationError) as caught:
        ProducerSettings.load(token=wrong)
    assert str(caught.value).startswith("TASK_TAGS_TOKEN: must be 1 to 8192 of the characters")
    assert wrong not in str(caught.value)
    assert ProducerSettings.load(token=" a.b.c\n").required_token == "a.b.c"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TASK_TAGS_JWT_ALGORITHMS", "HS999"),
        ("TASK_TAGS_JWT_ALGORITHMS", "HS256,"),
        ("TASK_TAGS_JWT_ALGORITHMS", "none"),
        ("TASK_TAGS_JWT_JWKS_URL", "file:///etc/passwd"),
        ("TASK_TAGS_JWT_AUDIENCE", " "),
        ("TASK_TAGS_RETENTION_DAYS", "0.0001"),
        ("TASK_TAGS_DATABASE_URL", f"postgresql://localhost:{'9' * 5000}/x"),
    ],
)
def test_what_would_fail_later_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """At the first token, the first purge or the first connection."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        Settings.load()


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("variable", "url", "reason"),
    [
        ("REDIS_URL", "redis://h/1?no_such=1", "can't have no_such, only client_name, "),
        ("REDIS_URL", "redis://h?decode_responses=true", "can't have decode_responses, only "),
        ("REDIS_URL", "redis://h?ssl_ca_certs=x", "can't have ssl_ca_certs, only "),
        ("REDIS_URL", "unix:///path?socket_keepalive=1", "can't have socket_keepalive, only "),
        ("REDIS_URL", "redis://h?socket_timeout=soon", "Invalid value for 'socket_timeout'"),
        ("REDIS_URL", "redis://h?socket_timeout=nan", "must have a socket_timeout above 0"),
        ("REDIS_URL", "redis://h?db=1&db=2", "must have one value for db"),
        ("REDIS_URL", "redis://h?db=", "must have one value for db"),
        ("REDIS_URL", "redis://h/name", "must end in the number of a database"),
        ("REDIS_URL", "redis://h/0/1", "must end in the number of a database"),
        ("REDIS_URL", "rediss://h?ssl_cert_reqs=hunter2", "must have none, optional or required"),
        ("REDIS_URL", "redis://u:hunter2/rest@h", "must be like redis://host:6379/0"),
        ("REDIS_URL", "redis://u:1?hunter2=@h", "can't have this option, only "),
        ("DATABASE_URL", "postgresql://h/d?no_such=1", 'invalid connection option "no_such"'),
        ("DATABASE_URL", "postgresql://h/d?row_factory=x", 'connection option "row_factory"'),
        ("DATABASE_URL", "postgresql://h/d?sslmode=a&sslmode=b", "must be like postgresql://"),
    ],
)
def test_a_url_with_a_wrong_option_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, variable: str, url: str, reason: str
) -> None:
    """By the SDK and the processes alike."""
    monkeypatch.setenv(f"TASK_TAGS_{variable}", url)
    models = (ProducerSettings, Settings) if variable == "REDIS_URL" else (Settings,)
    for model in models:
        with pytest.raises(ConfigurationError, match=f"TASK_TAGS_{variable}: ") as caught:
            model.load()
        assert reason in str(caught.value)
        assert SECRET not in str(caught.value)
