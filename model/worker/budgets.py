"""How a worker's memory is split between its experts and its KV cache. Functions of numbers of bytes.

Experts come first: the KV cache gives way to them, but no further than one sequence of full length and a block for each
further sequence that may run. Where experts leave more than that, the KV cache gets a share of it; the rest is for
experts that arrive later.
"""

from __future__ import annotations

KV_SHARE = 0.3
"""Share of a CPU node's free memory, after the weights are loaded, that the KV caches of all its workers get."""
KV_SHARE_CUDA = 0.85
"""Share of a GPU's free memory, after the weights are loaded, that the KV cache gets."""
USABLE = 0.9
"""Share of a memory that may be planned for. The rest is for what nobody counts."""
LATER_SHARE = 0.5
"""Share of the memory that is still free after that, for experts that arrive later from a worker that dies or leaves.
"""


def room_for_experts(free_bytes: float, *, least_kv: int, given_kv: int | None) -> int:
    """Bytes for experts, of the free ones after the trunk is loaded. `given_kv`: bytes of the KV cache, if a user chose
    them; else it needs `least_kv`. Less than 0 if not even the KV cache fits."""
    return int(free_bytes * USABLE) - (least_kv if given_kv is None else given_kv)


def kv_bytes(free_bytes: float, *, experts_to_come: int, least: int, share: float, short: bool) -> int:
    """Bytes for the KV cache, of the free ones after the first experts are loaded. `experts_to_come`: bytes of them
    that further experts will take. `short`: not all experts fit that the worker should hold.
    """
    left = max(0.0, free_bytes - experts_to_come)
    at_least = min(int(left * USABLE), least)
    return at_least if short else max(int(left * share), at_least)
