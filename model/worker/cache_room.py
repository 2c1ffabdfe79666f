"""Divides a worker's memory for sequences: KV blocks, blocks of layers with a sliding window, states of running
sequences, and snapshots of states. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.lines import size_text
from elastic_moe.cluster.messages.epochs import StateRoom, WindowRoom, window_blocks

_SNAPSHOT_SHARE = 0.25
"""Share of the memory beyond that of one sequence that snapshots may take."""
_SNAPSHOTS_PER_SEAT = 4
"""Most snapshots for each sequence that may run, and most windows that are kept of its beginnings."""
_CHUNK_TOKENS = 512
"""Tokens of a prompt's chunk for which layers with a window have blocks, for each step in flight."""
_USUAL_TOKENS = 4096
"""Length of the sequences for which blocks of layers with a window and other blocks last equally long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSizes:
    """What sequences take in the layers with a sliding window."""

    tokens: int
    """Tokens of the window."""
    block_bytes: int
    """Bytes of a block in all these layers."""
    block_size: int
    max_num_batched_tokens: int
    steps_in_flight: int

    @property
    def per_sequence(self) -> int:
        """Most blocks of a sequence that decodes."""
        return window_blocks(self.tokens, steps_in_flight=self.steps_in_flight, block_size=self.block_size)

    @property
    def first(self) -> int:
        """Blocks for one sequence and the chunks of its prompt."""
        chunks = self.steps_in_flight * min(_CHUNK_TOKENS, self.max_num_batched_tokens)
        return self.per_sequence + -(-chunks // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizes:
    """What sequences take of a worker's memory."""

    block_bytes: int
    """Bytes of a block in the layers that keep all tokens; 0 if there are none."""
    blocks_per_sequence: int
    """Blocks of a sequence of full length."""
    max_num_seqs: int
    windows: WindowSizes | None = None
    """None if no layer has a sliding window."""
    state_bytes: int = 0
    """Bytes of one sequence's states; 0 if the model keeps none."""
    states_per_sequence: int = 0
    """States that a running sequence keeps at a time, because a step may have to be run again."""
    snapshots: bool = False
    """Whether it is of use to keep what is needed to go on from a prefix: snapshots of states, and windows."""

    @property
    def least(self) -> int:
        """Bytes for one sequence of full length, and for the first block of each further sequence that may run."""
        further = 0 if self.state_bytes else self.max_num_seqs - 1
        return self.one + self.seat_bytes + further * (self.block_bytes + self._window_bytes)

    @property
    def one(self) -> int:
        """Bytes of keys and values of one sequence of full length."""
        return self.blocks_per_sequence * self.block_bytes + self.first_window * self._window_bytes

    @property
    def seat_bytes(self) -> int:
        """Bytes of the states of one running sequence."""
        return self.state_bytes * self.states_per_sequence

    @property
    def _window_bytes(self) -> int:
        return 0 if self.windows is None else self.windows.block_bytes

    @property
    def first_window(self) -> int:
        """Blocks for the window of one sequence, and for chunks of its prompt."""
        return 0 if self.windows is None else min(self.windows.first, self.blocks_per_sequence)

    def window_room(self, spare_bytes: int) -> WindowRoom | None:
        """Blocks for windows, of what is left beside one sequence: as many as last as long as the other blocks, but no
        more than running sequences hold and prefixes are worth."""
        if self.windows is None:
            return None
        one = min(self.windows.per_sequence, self.blocks_per_sequence)
        usual = min(self.blocks_per_sequence, -(-_USUAL_TOKENS // self.windows.block_size))
        share = one * self._window_bytes / (one * self._window_bytes + usual * self.block_bytes)
        most = self.blocks_per_sequence * self.max_num_seqs
        if self.block_bytes:
            most = min(most, one * self.max_num_seqs * (1 + (_SNAPSHOTS_PER_SEAT if self.snapshots else 0)))
        blocks = self.first_window + int(spare_bytes * share) // self._window_bytes
        return WindowRoom(
            tokens=self.windows.tokens,
            blocks=max(self.first_window, min(blocks, most)),
            steps_in_flight=self.windows.steps_in_flight,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRoom:
    """How the memory is divided."""

    blocks: int
    """Blocks of the layers that keep all tokens."""
    windows: WindowRoom | None = None
    states: StateRoom | None = None


def divide(room_bytes: int, sizes: CacheSizes, *, max_model_len: int) -> CacheRoom:
    """Divide `room_bytes`. Raises UserError if a sequence of `max_model_len` tokens does not fit."""
    if room_bytes < sizes.one + sizes.seat_bytes:
        states = f" and {size_text(sizes.seat_bytes)} of states" if sizes.state_bytes else ""
        raise UserError(
            f"max_model_len {max_model_len} needs {size_text(sizes.one)} of KV cache{states}, {size_text(room_bytes)}"
            " are there: lower --max-model-len or raise --kv-cache-memory-bytes"
        )
    # states have a fixed size, while few sequences have full length, so states come first
    spare = room_bytes - sizes.one - sizes.seat_bytes
    seats, states_room = sizes.max_num_seqs, None
    if sizes.state_bytes:
        seat = sizes.seat_bytes + sizes.one // 4
        seats = min(seats, 1 + spare // seat)
        spare -= (seats - 1) * sizes.seat_bytes
        snapshots = min(_SNAPSHOTS_PER_SEAT * seats, int(spare * _SNAPSHOT_SHARE) // sizes.state_bytes)
        snapshots = snapshots if sizes.snapshots else 0
        spare -= snapshots * sizes.state_bytes
        states_room = StateRoom(seats=seats, snapshots=snapshots)
    windows = sizes.window_room(spare)
    blocks = most = sizes.blocks_per_sequence * seats
    if sizes.block_bytes:
        if windows is not None and sizes.windows is not None:
            spare -= (windows.blocks - sizes.first_window) * sizes.windows.block_bytes
        blocks = min(most, sizes.blocks_per_sequence + spare // sizes.block_bytes)
    return CacheRoom(blocks=blocks, windows=windows, states=states_room)
