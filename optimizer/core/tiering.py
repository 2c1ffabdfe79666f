"""The tiers of a placement problem: which experts the workers keep in fast memory, and how long they wait for the rest.

Legend: L MoE layers, E logical experts, W workers, S slots, B tokens of a step.

An expert has tokens in a step with the chance a = 1 - (1 - p x)^B, where p is the chance that a token chooses it and x
the worker's share of it. Found in the device it costs nothing more. Fetched from disk it costs a disk_fetch_s; from the
host's memory the less of a host_fetch_s and of p x B host_token_s. F_w is the sum over what worker w serves.

Workers wait for one another, and the one with the most misses in a step is not the one with the most on average. The
largest of W numbers is about their mean and e_W times the standard deviation s by which they differ (e_W: the expected
largest of W standard normal numbers). s is made linear at s0, its value for independent experts in even rooms, where
F0 is fetched in all, so a layer waits for

  G = max_w F_w + e_W (s^2 / 2 s0 + s0 / 2 sum_w F_w / F0),    s^2 = (sum_w u_w' V u_w - u' V u / W) / (W - 1)

with u_w[e] the seconds of fetching e if it is active, u their sum over the workers, and V the covariance of activity:
experts that are active in the same steps should be fetched by different workers. Experts that are in the devices are
computed in the meantime; `stall` is what G exceeds them by. Where the misses of a step are dealt, it is

  G = sum_w F_w / W + r,    r = (W - 1) / 2W (1 - exp(-2 m)) mean_w disk_fetch_s

since M misses end when ceil(M / W) are fetched; r is for m misses on average, in even rooms. Workers that share a
disk wait for sum_w F_w / W too, and r is 0. Where the KV cache gets what experts leave, every slot of a device costs
resident_s.

The tiers follow from the table: a worker keeps those experts in its device that save most. One slot of each layer that
does not fit stays free for what passes through; a larger cache area is counted as if it held the best experts that are
not pinned, which recency and frequency come near to (optimizer.buffering.lfru).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.placement import EMPTY, Placement, Tier, TierArray
from elastic_moe.optimizer.residency.activity import activity, activity_covariance, expected_largest
from elastic_moe.optimizer.residency.choice import NEVER_S, dealt

if TYPE_CHECKING:
    from elastic_moe.optimizer.core.problem import FloatArray, IntArray, PlacementProblem

BoolArray = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

LevelArray = npt.NDArray[np.int8]
"""[L, E, W] the tier in which each worker finds an expert, or NOT_HELD."""

NOT_HELD = -1
"""Marks the levels of experts that a worker does not serve."""


def is_tiered(problem: PlacementProblem) -> bool:
    """Whether some worker may be given more experts than its device holds, or than are worth their memory."""
    return any(
        memory.resident_s > 0 or problem.num_layers * min(worker.slots, problem.num_experts) > memory.device_experts
        for worker, memory in zip(problem.workers, problem.memory, strict=False)
    )


class Tiering:
    """The prices and rooms of a problem whose experts do not all fit."""

    def __init__(self, problem: PlacementProblem) -> None:
        self._layers, self._experts = problem.loads.shape
        self._width = len(problem.workers)
        self.tokens = float(problem.tokens_per_step)
        self.chance = np.asarray(problem.loads / problem.tokens[:, None])
        """[L, E] chance that a token chooses each expert."""
        memory = problem.memory
        self.device = np.array([m.device_experts for m in memory])
        self.host = np.array([m.host_experts for m in memory])
        self.cache = np.array([m.cache_slots for m in memory])
        self.disk_s = np.array([m.disk_fetch_s for m in memory])
        self.host_s = np.array([m.host_fetch_s if m.host_experts else m.disk_fetch_s for m in memory])
        # not infinite where hosts do not compute, because that times 0 tokens would not be a number
        self.token_s = np.array([1e9 if m.host_token_s is None else m.host_token_s for m in memory])
        self.resident_s = np.array([m.resident_s for m in memory])
        self.active = activity(self.chance, self.tokens)
        """[L, E] share of steps in which each expert has tokens."""
        together = problem.dealt or problem.shared_disk
        self.own = 0.0 if together else 1.0
        """Seconds that a layer waits for each second that its slowest worker fetches on average."""
        self.slope, self.steep, self.rest_s = self._dealt(problem) if together else (*self._spread(), self._zeros())
        """[L] seconds that a layer waits: for each second of fetching, because workers differ in a step; for each
        squared second of the variance of fetching; and whatever is fetched."""
        self.covariance = self._covariance(problem)
        """[L, E, E] covariance of having tokens in a step."""
        self._busy = self.chance * (self.tokens * problem.token_expert_s)
        self._speed = problem.speed
        self.weight = self.slope + self.own / self._width
        """[L] seconds that a layer waits for each second of fetching, where workers are even."""

    def _zeros(self) -> FloatArray:
        return np.zeros(self._layers)

    def _outside(self) -> FloatArray:
        """[L, n] how often those experts are active that lie in no memory, in even rooms."""
        inside = int((np.maximum(self.device // self._layers - 1, 0) + self.host // self._layers).sum())
        return np.sort(self.active, axis=1)[:, ::-1][:, inside:]

    def _dealt(self, problem: PlacementProblem) -> tuple[FloatArray, FloatArray, FloatArray]:
        if problem.shared_disk:
            return self._zeros() + 1 / self._width, self._zeros(), self._zeros()
        rounded_up = (1 - 1 / self._width) / 2 * (1 - np.exp(-2 * self._outside().sum(axis=1)))
        return self._zeros() + 1 / self._width, self._zeros(), rounded_up * float(self.disk_s.mean())

    def _spread(self) -> tuple[FloatArray, FloatArray]:
        outside = self._outside()
        unit_s = float(self.disk_s.mean())
        fetched = unit_s * outside.sum(axis=1)
        spread = unit_s * np.sqrt((outside * (1 - outside)).sum(axis=1) / self._width)
        largest = expected_largest(self._width)
        differ = spread > 1e-6 * fetched
        slope = np.where(differ, largest * spread / 2 / np.maximum(fetched, 1e-300), 0.0)
        steep = np.where(differ, largest / (2 * np.maximum(spread, 1e-300) * max(self._width - 1, 1)), 0.0)
        return slope, steep

    def _covariance(self, problem: PlacementProblem) -> FloatArray:
        together = problem.pairs / problem.tokens[:, None, None]
        pairs = zip(self.chance, together, strict=True)
        return np.stack([activity_covariance(chance, both, self.tokens) for chance, both in pairs])

    def fetch_prices(self, share: FloatArray, layer: int | slice = slice(None)) -> tuple[FloatArray, FloatArray]:
        """([..., E, W] from disk, [..., E, W] from host) seconds per step, for shares [..., E, W]."""
        load = self.chance[layer][..., None] * share
        active = activity(load, self.tokens)
        from_host = np.minimum(active * self.host_s, load * self.tokens * self.token_s)
        return np.asarray(active * self.disk_s), np.asarray(from_host)

    def levels(self, x: FloatArray, placed: LevelArray | None = None, barred: BoolArray | None = None) -> LevelArray:
        """[L, E, W] the tier in which each share [L, E, W] is found, or NOT_HELD. What is `placed` in a device or in a
        host's memory comes first there; what is `barred` [L, E, W] comes into no device."""
        disk, host = self.fetch_prices(x)
        held = x > 0
        at = np.full(x.shape, NOT_HELD, dtype=np.int8) if placed is None else placed
        out = np.zeros(x.shape, dtype=bool) if barred is None else barred
        busy = (self._busy[:, :, None] * x).sum(axis=1) / self._speed
        found = np.where(held, np.int8(Tier.DISK), np.int8(NOT_HELD))
        order = np.lexsort((-disk, at != Tier.DEVICE, out, ~held), axis=1)
        rooms = self._device_rooms(held, disk, at == Tier.DEVICE, out & held, order, busy.max(axis=1))
        place = np.argsort(order, axis=1)
        found[place < rooms[:, None, :]] = Tier.DEVICE
        if self.host.any():
            saving = np.where(found == Tier.DISK, disk - host, -1.0) * self.weight[:, None, None]
            for rank in np.flatnonzero(self.host):
                mine = saving[:, :, rank].ravel()
                best = np.lexsort((-mine, at[:, :, rank].ravel() != Tier.HOST, mine <= 0))[: self.host[rank]]
                layer, expert = np.divmod(best[mine[best] > 0], self._experts)
                found[layer, expert, rank] = Tier.HOST
        return np.asarray(found, dtype=np.int8)

    def _device_rooms(
        self, held: BoolArray, disk: FloatArray, at: BoolArray, out: BoolArray, order: Indices, busy: FloatArray
    ) -> Indices:
        """[L, W] how many of a worker's experts, in their order [L, E, W], are found in its device."""
        count = held.sum(axis=1)
        if not out.any() and not self.resident_s.any() and (count.sum(axis=0) <= self.device).all():
            return np.asarray(count)
        allowed = (held & ~out).sum(axis=1)
        ordered = np.take_along_axis(disk, order, axis=1)
        tails = np.concatenate([np.zeros_like(ordered[:, :1]), np.cumsum(ordered[:, ::-1], axis=1)], axis=1)[:, ::-1]
        least = at.sum(axis=1)
        least = least + (least < count)
        outside = []
        for rank in range(self._width):
            most = int(count[:, rank].max())
            slots = np.arange(most + 1)[None, :]
            n, usable = count[:, rank, None], allowed[:, rank, None]
            inside = np.where((slots >= n) & (usable == n), n, np.minimum(slots - 1, usable))
            curve = np.take_along_axis(tails[:, :, rank], np.maximum(inside, 0), axis=1)
            keeps = least[:, rank, None] if least[:, rank].sum() <= self.device[rank] else np.minimum(n, 1)
            outside.append(np.where(slots < keeps, NEVER_S, curve))
        slope = (1 + self.own) * self.slope
        slots = dealt(outside, self.device, busy, slope, self.resident_s, self.own)
        return np.asarray(np.where((slots >= count) & (allowed == count), count, np.minimum(slots - 1, allowed)))

    def levels_within(self, x: FloatArray, before: FloatArray, most: int) -> LevelArray:
        """As `levels`, where at most `most` experts come into a device that does not have them `before` [L, E, W]."""
        levels = self.levels(x)
        new = (self.marks(x, levels, before) == Tier.DEVICE) & (before == 0)
        if int(new.sum()) <= most:
            return levels
        disk, _ = self.fetch_prices(x)
        value = np.where(new, disk * self.weight[:, None, None], -1.0).ravel()
        kept = np.zeros(value.size, dtype=bool)
        kept[np.argsort(-value, kind="stable")[:most]] = True
        return self.levels(x, barred=(before == 0) & ~kept.reshape(x.shape))

    def prices(self, x: FloatArray, levels: LevelArray) -> FloatArray:
        """[L, E, W] seconds per step that each worker fetches each expert."""
        disk, host = self.fetch_prices(x)
        return np.where(levels == Tier.DISK, disk, np.where(levels == Tier.HOST, host, 0.0))

    def waits(self, x: FloatArray, levels: LevelArray) -> FloatArray:
        """[L] seconds that each layer waits for its slowest worker."""
        prices = self.prices(x, levels)
        fetch_s = prices.sum(axis=1)
        unit = prices / np.maximum(self.active, 1e-300)[:, :, None]
        spread = spread_s(self.covariance, self.slope, self.steep, fetch_s, unit)
        return np.asarray(self.own * fetch_s.max(axis=1) + spread + self.rest_s)

    def rooms(self, levels: LevelArray) -> tuple[IntArray, IntArray]:
        """([L, W] experts in the device, the slot for those that pass included; [L, W] experts in the host)."""
        device = (levels == Tier.DEVICE).sum(axis=1)
        outside = (levels > Tier.DEVICE).any(axis=1)
        return (device + outside).astype(np.int32), (levels == Tier.HOST).sum(axis=1).astype(np.int32)

    def kv_s(self, levels: LevelArray) -> float:
        """Seconds per step for the KV cache whose memory the experts in devices have."""
        return float((self.rooms(levels)[0] * self.resident_s).sum())

    def marks(self, x: FloatArray, levels: LevelArray, before: FloatArray | None = None) -> LevelArray:
        """[L, E, W] the tiers of a placement: `levels`, but the cache area of a layer that does not fit has its slots
        to itself: those experts are found there by the policy, and not pinned, that are not in the device `before`
        [L, E, W], and of the others the least active ones."""
        disk, _ = self.fetch_prices(x)
        first = np.zeros(x.shape) if before is None else before
        marked = levels.copy()
        for layer, rank in zip(*np.nonzero((levels > Tier.DEVICE).any(axis=1)), strict=True):
            inside = np.flatnonzero(levels[layer, :, rank] == Tier.DEVICE)
            order = np.lexsort((disk[layer, inside, rank], first[layer, inside, rank]))
            marked[layer, inside[order][: self.cache[rank] - 1], rank] = Tier.DISK
        return marked


def spread_s(
    covariance: FloatArray, slope: FloatArray | float, steep: FloatArray | float, fetch_s: FloatArray, unit: FloatArray
) -> FloatArray:
    """[...] seconds for which the slowest worker exceeds the mean, for covariances [..., E, E], what workers fetch
    [..., W], and the seconds of fetching each expert if it is active [..., E, W]."""
    width = unit.shape[-1]
    total = unit.sum(axis=-1, keepdims=True)
    own = (np.matmul(covariance, unit) * unit).sum(axis=(-2, -1))
    shared = (np.matmul(covariance, total) * total).sum(axis=(-2, -1)) / width
    return np.asarray(slope * fetch_s.sum(axis=-1) + steep * (own - shared))


def tiers_of_table(problem: PlacementProblem, table: IntArray, marks: LevelArray) -> TierArray:
    """[L, S] the tiers of a table's slots; EMPTY ones are DEVICE."""
    found = marks[np.arange(problem.num_layers)[:, None], np.maximum(table, 0), problem.owner[None, :]]
    return np.asarray(np.where(table == EMPTY, Tier.DEVICE, found), dtype=np.int8)


def placed_by(problem: PlacementProblem, placement: Placement) -> LevelArray | None:
    """[L, E, W] the tier of each expert under the placement, or NOT_HELD; None where it says nothing about tiers."""
    if placement.all_resident:
        return None
    placed = np.full((problem.num_layers, problem.num_experts, len(problem.workers)), NOT_HELD, dtype=np.int8)
    layer, slot = np.nonzero(placement.physical_to_logical_map != EMPTY)
    expert = placement.physical_to_logical_map[layer, slot]
    placed[layer, expert, problem.owner[slot]] = placement.tiers[layer, slot]
    return placed
