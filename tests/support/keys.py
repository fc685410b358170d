"""Keys of each kind, and claims of a good token, for tests of tokens."""

from __future__ import annotations

import base64
import json
import time
from typing import Any
from uuid import uuid4

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import SecretStr

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
AUDIENCE = {"jwt_audience": "task-tags", "jwt_issuer": "https://issuer"}
MADE_FOR_US = {"aud": "task-tags", "iss": "https://issuer"}


def settings(**values: Any) -> Settings:
    return Settings.model_construct(**{"jwt_secret": SecretStr(SECRET), **values})


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()
