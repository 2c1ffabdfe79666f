"""Ray's own key-value store, for what outlives a process. It lives as long as the Ray cluster does.

Ray's GCS holds it. A server with a Ray of its own ends with the GCS anyway; where a cluster's GCS is fault-tolerant, so
is this store. Here alone Ray's private functions for it are called.
"""

from __future__ import annotations

from typing import Protocol

from ray.experimental import internal_kv

API_NAMESPACE = "emoe-api"
"""The namespace of what all API replicas share."""

CLUSTERS_NAMESPACE = "emoe"
"""The namespace of what is known of clusters, and of what their coordinators save."""


class KeyValue(Protocol):
    """Keys and values; every method blocks for a call to another process, and may be called from any thread."""

    def put(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes | None: ...

    def delete(self, key: str) -> None: ...

    def keys(self, prefix: str) -> list[str]: ...

    def clear(self, prefix: str = "") -> None:
        """Delete every key with the prefix."""
        ...


class RayKeyValue:
    """The keys of one namespace. Raises what Ray raises where its GCS does not answer."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def put(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=self._namespace)

    def get(self, key: str) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=self._namespace)
        return value

    def delete(self, key: str) -> None:
        internal_kv._internal_kv_del(key, namespace=self._namespace)

    def keys(self, prefix: str) -> list[str]:
        return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=self._namespace)]

    def clear(self, prefix: str = "") -> None:
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=self._namespace)


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

    def clear(self, prefix: str = "") -> None:
        for key in self.keys(prefix):
            self.delete(key)
