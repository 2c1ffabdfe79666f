"""What one worker's tiers hold, and how long an expert takes from each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """The tiers of one worker. Numbers of experts are over all layers."""

    device_experts: int
    """Experts that the device holds, those of the cache areas included: at least one of each layer."""
    disk_fetch_s: float
    """Seconds to bring one expert from disk into the device."""
    host_experts: int = 0
    """Experts that the host's memory holds beside the device; 0 where there is no such tier."""
    host_fetch_s: float = 0.0
    """Seconds to bring one expert from the host's memory into the device."""
    host_token_s: float | None = None
    """Seconds that one token takes in an expert which the host's cores compute where it lies; None: they do not."""
    resident_s: float = 0.0
    """Seconds per step that one more expert in the device costs, because the KV cache is smaller by it (`kv_price_s`);
    0 where the KV cache has its memory already, as in a running server."""
    cache_slots: int = 1
    """Slots of the cache area that every layer keeps whose experts do not all fit; pinned experts take the others."""


def kv_price_s(step_s: float, step_tokens: int, expert_bytes: float, sequence_bytes: float) -> float:
    """Seconds per step that a resident expert costs which takes its memory from the KV cache.

    `sequence_bytes` of KV cache are a sequence, which gives a step one of its `step_tokens` tokens. So the expert takes
    expert_bytes / sequence_bytes tokens of each step of `step_s` seconds.
    """
    return step_s / step_tokens * expert_bytes / sequence_bytes
