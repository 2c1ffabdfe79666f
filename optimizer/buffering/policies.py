"""The policies that a server can run, by name."""

from __future__ import annotations

from collections.abc import Callable

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.optimizer.buffering.interface import Policy
from elastic_moe.optimizer.buffering.lfru import Lfru
from elastic_moe.optimizer.buffering.lfu import Lfu
from elastic_moe.optimizer.buffering.lifo import Lifo
from elastic_moe.optimizer.buffering.lru import Lru

_MAKERS: dict[str, Callable[[int], Policy]] = {
    "lfru": Lfru,
    "lfu": Lfu,
    "lru": Lru,
    "lifo": lambda num_experts: Lifo(),
}

POLICIES: tuple[str, ...] = tuple(_MAKERS)

DEFAULT_POLICY = "lfru"


def make_policy(name: str, num_experts: int) -> Policy:
    """A fresh policy for one layer of `num_experts` experts. Raises ConfigError for an unknown name."""
    if name not in _MAKERS:
        raise ConfigError(f"expert_cache_policy: expected one of {', '.join(POLICIES)}, got {name!r}")
    return _MAKERS[name](num_experts)
