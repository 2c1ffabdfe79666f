"""What one layer's workers wait for experts that are not in their devices, and how a swap of two slots changes it.

Legend: E experts, W workers, S slots (items).

Each worker keeps the most active of its experts in the device, so what it fetches is the tail of its sorted items. With
a room of r, and h more in the host's memory, it is host_s tail(r) + (disk_s - host_s) tail(r + h). A swap moves one
item over the edge of a tail at most, so its change is known from the two items beside the edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic_moe.optimizer.core.problem import FloatArray, IntArray
from elastic_moe.optimizer.core.tiering import spread_s
from elastic_moe.optimizer.residency.activity import activity


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFetch:
    """The tiers of one layer while its rooms stay."""

    chance: FloatArray
    """[E] chance that a token chooses each expert."""
    tokens: float
    """Tokens of a step."""
    disk_s: FloatArray
    """[W] seconds to bring an expert from each worker's disk."""
    host_s: FloatArray
    """[W] seconds to bring an expert from each worker's host memory."""
    token_s: FloatArray
    """[W] seconds of one token in an expert that the host computes."""
    room: IntArray
    """[W] experts in the device; where more are held, one of the slots is for those that pass."""
    host_room: IntArray
    """[W] experts in the host's memory."""
    active: FloatArray
    """[E] share of steps in which each expert has tokens."""
    covariance: FloatArray
    """[E, E] covariance of having tokens in a step."""
    slope: float
    """Seconds that the layer waits for each second of fetching, because workers differ in a step."""
    steep: float
    """Seconds that the layer waits for each squared second of the variance of fetching."""
    own: float = 1.0
    """Seconds that the layer waits for each second that the slowest worker fetches on average."""
    rest_s: float = 0.0
    """Seconds that the layer waits whatever is fetched."""

    def waits(self, x: FloatArray) -> FloatArray:
        """[W] seconds for which each worker makes the layer wait for shares x [E, W]; the largest counts."""
        prices = self.prices(x)
        fetch_s = prices.sum(axis=0)
        unit = prices / np.maximum(self.active, 1e-300)[:, None]
        spread = spread_s(self.covariance, self.slope, self.steep, fetch_s, unit)
        return np.asarray(self.own * fetch_s + spread + self.rest_s)

    def prices(self, x: FloatArray) -> FloatArray:
        """[E, W] seconds per step that each worker fetches each expert."""
        load = self.chance[:, None] * x
        active = activity(load, self.tokens)
        order = np.argsort(-active, axis=0, kind="stable")
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(len(x))[:, None], axis=0)
        outside = (place >= self.inside((x > 0).sum(axis=0))) & (x > 0)
        disk = active * self.disk_s
        if not self.host_room.any():
            return np.where(outside, disk, 0.0)
        host = np.minimum(active * self.host_s, load * self.tokens * self.token_s)
        saved = np.where(outside, np.maximum(disk - host, 0.0), 0.0)
        order = np.argsort(-saved, axis=0, kind="stable")
        np.put_along_axis(place, order, np.arange(len(x))[:, None], axis=0)
        return np.where(outside, disk, 0.0) - np.where(place < self.host_room, saved, 0.0)

    def inside(self, held: IntArray) -> IntArray:
        """[W] experts that are found in the device, of `held` [W] ones."""
        return np.asarray(np.where(held <= self.room, held, np.maximum(self.room - 1, 0)))

    def swap_changes(self, load: FloatArray, held: IntArray, owner: IntArray, first_slot: IntArray) -> FloatArray:
        """[S, S] change of what worker owner[i] fetches if it gives item i for item j; `load` [S] are the items'
        chances, `held` [W] the experts of each worker."""
        active = activity(load, self.tokens)
        inside = self.inside(held)
        change = _tail_changes(active, inside, owner, first_slot)
        if not self.host_room.any():
            return np.asarray(self.disk_s[owner][:, None] * change)
        near = np.where(self.host_room > 0, self.host_s, 0.0)
        further = _tail_changes(active, np.minimum(inside + self.host_room, np.bincount(owner)), owner, first_slot)
        return np.asarray(near[owner][:, None] * change + (self.disk_s - near)[owner][:, None] * further)

    def variance_changes(self, unit: FloatArray, row: IntArray, owner: IntArray) -> FloatArray:
        """[S, S] change of u' V u of worker owner[i] if it fetches item j for item i, where it fetches both kinds.

        `unit` [E, W] are the seconds of fetching each expert if it is active; `row` [S]. A swap with what lies in the
        device changes the sums only where it moves an item over the edge, and is left to the full evaluation.
        """
        item_s = np.append(unit, np.zeros((1, unit.shape[1])), axis=0)[row, owner]  # the last row stands for EMPTY
        of_two = self.covariance[row[:, None], row]
        with_worker = (self.covariance @ unit)[row]
        own = np.diagonal(of_two)
        # item j comes to worker a = owner[i] at a's price, and item i leaves it
        rate = np.maximum(self.disk_s[owner], 1e-300)
        seconds = rate[:, None] * (item_s / rate)[None, :]
        together = with_worker.T[owner] - of_two * item_s[:, None]
        change = seconds * (2 * together + own[None, :] * seconds)
        leaving = item_s * (2 * with_worker[np.arange(len(row)), owner] - own * item_s)
        both = (item_s[:, None] > 0) & (item_s[None, :] > 0)
        return np.where(both, change - leaving[:, None], 0.0)


def _tail_changes(active: FloatArray, inside: IntArray, owner: IntArray, first_slot: IntArray) -> FloatArray:
    """[S, S] change of the sum of all but the `inside` [W] largest items of worker owner[i], if item j comes for i."""
    order = np.lexsort((-active, owner))
    place = np.empty(len(owner), dtype=np.intp)
    place[order] = np.arange(len(owner)) - first_slot[owner[order]]
    slots = np.bincount(owner)
    ordered = np.append(active[order], 0.0)
    first_outside = ordered[np.where(inside < slots, first_slot + inside, len(owner))]
    last_inside = np.where(inside > 0, ordered[first_slot + np.maximum(inside - 1, 0)], 0.0)
    within = place < inside[owner]
    edge = np.where(within, first_outside[owner], last_inside[owner])
    gone = np.where(within, first_outside[owner], active)
    return np.asarray(np.minimum(active[None, :], edge[:, None]) - gone[:, None])
