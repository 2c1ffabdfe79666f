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
    cache_slots: int = 1
    """Slots of the cache area that every layer keeps whose experts do not all fit; pinned experts take the others."""
