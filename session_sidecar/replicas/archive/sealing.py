"""Encryption at rest: AES-256-GCM under keys that are derived for each resource. Without keys, plain bytes and hashes.

A key of the setting is a master key. HKDF-SHA256 makes two of it for each resource, with the resource's random salt:
one seals, the other makes the MACs by which what is stored is compared with a local file, without reading it. What is
sealed opens only in its own place: the same session, path, seq and offset, under the same resource and key.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from session_sidecar.errors import KeyMissing, SealBroken
from session_sidecar.replicas.archive.chunks import Chunk, ChunkHead
from session_sidecar.settings import SettingsError

KEY_BYTES = 32
SALT_BYTES = 32
_NONCE_BYTES = 12

Place = tuple[str, str | None, int, int]
"""Where something belongs: session, path, seq, offset. An outline has no path."""


class Keyring:
    """The operator's keys by their IDs: the first one writes, all of them read. An empty one seals nothing."""

    def __init__(self, keys: Mapping[str, bytes] | None = None) -> None:
        self._keys = dict(keys or {})

    @classmethod
    def of_setting(cls, setting: str | None) -> Self:
        """The keys of `id:base64,id:base64…`; without it, none. Raises SettingsError, which never shows a key."""
        keys: dict[str, bytes] = {}
        for number, entry in enumerate(setting.split(",") if setting is not None else (), 1):
            key_id, colon, text = entry.strip().partition(":")
            if not colon or not key_id:
                raise SettingsError(_wrong(number, "is not id:base64"))
            if key_id in keys:
                raise SettingsError(_wrong(number, f"has the ID of one before it, {key_id}"))
            try:
                key = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise SettingsError(_wrong(number, "is not base64 behind its ID")) from None
            if len(key) != KEY_BYTES:
                raise SettingsError(
                    _wrong(number, f"has {len(key)} bytes; it takes {KEY_BYTES} (openssl rand -base64 32)")
                )
            keys[key_id] = key
        return cls(keys)

    @property
    def first(self) -> str | None:
        """The ID of the key that writes; None if nothing is sealed."""
        return next(iter(self._keys), None)

    def __contains__(self, key_id: str | None) -> bool:
        """Whether what is sealed with this key could be opened; what is not sealed can."""
        return key_id is None or key_id in self._keys

    def seal_of(self, resource_id: str, salt: bytes | None) -> "Seal":
        """What seals and opens for one resource; without its salt it only opens what is plain."""
        return Seal(self._keys, resource_id, salt)


class Seal:
    """Seals and opens what is one resource's."""

    def __init__(self, keys: Mapping[str, bytes], resource_id: str, salt: bytes | None) -> None:
        """Keyring.seal_of makes one."""
        self._keys = keys
        self.resource_id = resource_id
        self._salt = salt
        self._derived: dict[str, tuple[AESGCM, bytes]] = {}
        self.key_id = next(iter(keys), None)
        """The ID of the key that `seal` uses."""

    @property
    def can_write(self) -> bool:
        """Whether there is a salt to seal with, or nothing is sealed."""
        return self.key_id is None or self._salt is not None

    def chunk(self, session_id: str, path: str, seq: int, offset: int, data: bytes) -> Chunk:
        """A chunk of a file, as it is to be stored. Raises KeyMissing."""
        head = ChunkHead(path, seq, offset, len(data), self.mac(data, self.key_id), self.key_id)
        return Chunk(head, self.seal((session_id, path, seq, offset), data))

    def bytes_of(self, session_id: str, chunk: Chunk) -> bytes:
        """The bytes of a file that a stored chunk holds. Raises KeyMissing, and SealBroken as `open` does."""
        head = chunk.head
        data = self.open((session_id, head.path, head.seq, head.offset), head.key_id, chunk.data)
        if len(data) != head.length or (head.key_id is None and self.mac(data, None) != head.mac):
            raise SealBroken(f"Nothing was changed. What is stored of session {session_id} was altered.")
        return data

    def mac(self, data: bytes, key_id: str | None) -> bytes:
        """What stands for these bytes where they are sealed with that key; a plain hash where with none.

        Raises KeyMissing.
        """
        if key_id is None:
            return hashlib.sha256(data).digest()
        return hmac.digest(self._of(key_id)[1], data, "sha256")

    def seal(self, place: Place, data: bytes) -> bytes:
        """The bytes as they are stored: sealed with the key that writes, or as they are. Raises KeyMissing."""
        if self.key_id is None:
            return data
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._of(self.key_id)[0].encrypt(nonce, data, _bound(place, self.key_id))

    def open(self, place: Place, key_id: str | None, data: bytes) -> bytes:
        """The bytes that were stored in this place.

        Raises KeyMissing, and SealBroken where the key is another one or what is stored has been changed or moved.
        """
        if key_id is None:
            return data
        cipher, _ = self._of(key_id)
        try:
            return cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], _bound(place, key_id))
        except (InvalidTag, ValueError):  # the latter where there is not even a nonce
            raise SealBroken(
                f"Nothing was changed. What is stored of session {place[0]} does not open with the key {key_id!r}: "
                "the key is not the one that it was sealed with, or the stored bytes were altered."
            ) from None

    def _of(self, key_id: str) -> tuple[AESGCM, bytes]:
        if (derived := self._derived.get(key_id)) is not None:
            return derived
        if key_id not in self._keys:
            raise KeyMissing(
                f"Nothing was changed. This conversation is sealed with the key {key_id!r}, which "
                "SIDECAR_ENCRYPTION_KEYS does not have: the operator has to add it behind the others."
            )
        if self._salt is None:
            raise KeyMissing("The key of this resource was deleted; what was sealed with it cannot be read any more.")
        info = b"session-sidecar archive 1\0" + self.resource_id.encode()
        both = HKDF(SHA256(), 2 * KEY_BYTES, self._salt, info).derive(self._keys[key_id])
        self._derived[key_id] = derived = (AESGCM(both[:KEY_BYTES]), both[KEY_BYTES:])
        return derived


def _bound(place: Place, key_id: str) -> bytes:
    return json.dumps([*place, key_id]).encode()


def _wrong(number: int, what: str) -> str:
    return f"SIDECAR_ENCRYPTION_KEYS: entry {number} {what}"
