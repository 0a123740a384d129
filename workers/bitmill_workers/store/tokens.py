"""Tokens of pushes: encrypted under the operator's key, erased when the push has ended.

    sealed = nonce || AES-256-GCM(key, nonce, token, job id)

The job's id is authenticated, so a row of one job opens for no other. Every end of a job erases its
row, in the transaction that ends it (`store/transitions.py`).
"""

from __future__ import annotations

import base64
import os

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from bitmill.errors import InputError
from bitmill_workers.store.db import Database
from bitmill_workers.store.tables import push_tokens

_NONCE = 12


def seal(key: SecretStr, job_id: str, token: SecretStr) -> bytes:
    """What may be stored of a token."""
    nonce = os.urandom(_NONCE)
    text = token.get_secret_value().encode()
    return nonce + _cipher(key).encrypt(nonce, text, job_id.encode())


def open_token(database: Database, key: SecretStr | None, job_id: str) -> SecretStr:
    """The token of a push.

    Raises `InputError` (code `push_token_lost`) where there is none, or it was encrypted under
    another key.
    """
    query = sa.select(push_tokens.c.sealed).where(push_tokens.c.job_id == job_id)
    with database.read() as conn:
        sealed = conn.execute(query).scalar_one_or_none()
    if sealed is not None and key is not None:
        nonce, text = sealed[:_NONCE], sealed[_NONCE:]
        try:
            return SecretStr(_cipher(key).decrypt(nonce, text, job_id.encode()).decode())
        except InvalidTag:
            pass
    raise InputError(
        "the token of this push cannot be read: this worker's push_key is not the one it was "
        "encrypted under",
        code="push_token_lost",
        hint="Give all processes the same BITMILL_PUSH_KEY and push again.",
    )


def _cipher(key: SecretStr) -> AESGCM:
    return AESGCM(base64.b64decode(key.get_secret_value()))
