"""Ray's own key-value store, as a place for what all API replicas share. It lives as long as the Ray cluster does.

Ray's GCS holds it. A server with a Ray of its own ends with the GCS anyway; where a cluster's GCS is fault-tolerant, so
is this store.
"""

from __future__ import annotations

from typing import Protocol

from ray.experimental import internal_kv

_NAMESPACE = b"emoe-api"


class KeyValue(Protocol):
    """Keys and values; every method blocks for a call to another process, and may be called from any thread."""

    def put(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes | None: ...

    def delete(self, key: str) -> None: ...

    def keys(self, prefix: str) -> list[str]: ...


class RayKeyValue:
    """Raises what Ray raises where its GCS does not answer."""

    def put(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)

    def get(self, key: str) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        return value

    def delete(self, key: str) -> None:
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)

    def keys(self, prefix: str) -> list[str]:
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)]


class LocalKeyValue:
    """The same in this process, for tests."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def delete(self, key: str) -> None:
        self._values.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in list(self._values) if key.startswith(prefix)]


def clear() -> None:
    """Forget what the replicas of an earlier server have shared."""
    internal_kv._internal_kv_del("", del_by_prefix=True, namespace=_NAMESPACE)
