"""Divides a worker's memory for sequences: KV blocks, states of running sequences, and snapshots of states. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.messages.epochs import StateRoom

_SNAPSHOT_SHARE = 0.25
"""Share of the memory beyond that of one sequence that snapshots may take."""
_SNAPSHOTS_PER_SEAT = 4
"""Most snapshots for each sequence that may run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizes:
    """What sequences take of a worker's memory."""

    block_bytes: int
    blocks_per_sequence: int
    """Blocks of a sequence of full length."""
    max_num_seqs: int
    state_bytes: int = 0
    """Bytes of one sequence's states; 0 if the model keeps none."""
    states_per_sequence: int = 0
    """States that a running sequence keeps at a time, because a step may have to be run again."""
    snapshots: bool = False
    """Whether snapshots of states are of use."""

    @property
    def least(self) -> int:
        """Bytes for one sequence of full length, and for the first block of each further sequence that may run."""
        blocks = self.blocks_per_sequence + (0 if self.state_bytes else self.max_num_seqs - 1)
        return blocks * self.block_bytes + self.seat_bytes

    @property
    def seat_bytes(self) -> int:
        """Bytes of the states of one running sequence."""
        return self.state_bytes * self.states_per_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRoom:
    """How the memory is divided."""

    blocks: int
    states: StateRoom | None = None


def divide(room_bytes: int, sizes: CacheSizes, *, max_model_len: int) -> CacheRoom:
    """Divide `room_bytes`. Raises UserError if a sequence of `max_model_len` tokens does not fit."""
    one = sizes.blocks_per_sequence * sizes.block_bytes
    if room_bytes < one + sizes.seat_bytes:
        states = f" and {sizes.seat_bytes >> 20} MiB of states" if sizes.state_bytes else ""
        raise UserError(
            f"max_model_len {max_model_len} needs {one >> 20} MiB of KV cache{states}, {room_bytes >> 20} MiB are"
            " there: lower --max-model-len or raise --kv-cache-memory-bytes"
        )
    if not sizes.state_bytes:
        return CacheRoom(blocks=min(room_bytes // sizes.block_bytes, sizes.blocks_per_sequence * sizes.max_num_seqs))
    # states have a fixed size, while few sequences have full length, so states come first
    spare = room_bytes - one - sizes.seat_bytes
    seat = sizes.seat_bytes + one // 4
    seats = min(sizes.max_num_seqs, 1 + spare // seat)
    spare -= (seats - 1) * sizes.seat_bytes
    snapshots = min(_SNAPSHOTS_PER_SEAT * seats, int(spare * _SNAPSHOT_SHARE) // sizes.state_bytes)
    snapshots = snapshots if sizes.snapshots else 0
    blocks = sizes.blocks_per_sequence + (spare - snapshots * sizes.state_bytes) // sizes.block_bytes
    return CacheRoom(
        blocks=min(blocks, sizes.blocks_per_sequence * seats), states=StateRoom(seats=seats, snapshots=snapshots)
    )
