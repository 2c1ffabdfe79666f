"""A worker's end of plans that say only what changes.

A sequence that runs one token after the other has no message of its own. A plan names the seats of such sequences when
they change, and blocks when a sequence needs one. Otherwise the worker goes on with the seats of the plan before, each
with one more token. That is exact, because a worker runs plans in order, refuses every plan of an epoch after one that
failed, and gets all seats with the first plan of an epoch and with the first one after a failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from elastic_moe.cluster.messages.columns import NO_TOKEN, column_of, integers
from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Chunk, Decoding, NewSequence, Sample, StepPlan, WindowBlocks


class Seats:
    """The sequences of one worker by their seats. Turns each plan, in order, into chunks."""

    __slots__ = ("_decoding", "_known", "_names", "_num_blocks", "_seat_of")

    def __init__(self) -> None:
        self._decoding: list[int] = []
        """The seats of the plan before whose sequences go on decoding; `_known` has their numbers of tokens then."""
        self._known: list[int] = []
        self._names: dict[int, RequestId] = {}
        self._seat_of: dict[RequestId, int] = {}
        self._num_blocks: dict[int, int] = {}
        """Number of blocks that each seat's sequence has been given."""

    def chunks(self, plan: StepPlan) -> tuple[Chunk, ...]:
        """The chunks of all sequences in the plan's order: those that decode, then the plan's own.

        Raises KeyError or ValueError for a plan that does not follow from the plans before.
        """
        for new in plan.new:
            self._seat(new)
        decoding = tuple(self._decode(plan.decoding))
        for chunk in plan.chunks:
            seat = self._seat_of.get(chunk.request_id)
            if seat is not None:
                self._num_blocks[seat] = chunk.block_offset + len(chunk.block_ids)
        return decoding + plan.chunks

    def _seat(self, new: NewSequence) -> None:
        before = self._names.get(new.seat)
        if before is not None and self._seat_of.get(before) == new.seat:
            del self._seat_of[before]
        self._names[new.seat] = new.request_id
        self._seat_of[new.request_id] = new.seat
        self._num_blocks[new.seat] = 0

    def _decode(self, decoding: Decoding) -> Iterator[Chunk]:
        if decoding.seats is None:
            self._known = [known + 1 for known in self._known]
        else:
            self._decoding, self._known = integers(decoding.seats), integers(decoding.known)
        blocks, windows = _by_seat(decoding.grown), _by_seat(decoding.grown_windows)
        for seat, known in zip(self._decoding, self._known, strict=True):
            ids: tuple[int, ...] = ()
            offset = self._num_blocks[seat]
            if seat in blocks:
                offset, block = blocks[seat]
                ids = (block,)
                self._num_blocks[seat] = offset + 1
            yield Chunk(
                request_id=self._names[seat],
                start=known - 1,
                length=1,
                known=known,
                block_offset=offset,
                block_ids=ids,
                windows=WindowBlocks(first=windows[seat][0], ids=windows[seat][1:]) if seat in windows else None,
            )

    def packed(self, samples: Iterable[Sample]) -> tuple[bytes, tuple[Sample, ...]]:
        """The samples of the last plan as in StepResult: the tokens of those that decode, and the other samples."""
        rest = {sample.request_id: sample for sample in samples}
        tokens: list[int] = []
        for seat in self._decoding:
            sample = rest.get(self._names[seat])
            if sample is None or sample.logprobs is not None:
                tokens.append(NO_TOKEN)
            else:
                tokens.append(sample.token_id)
                del rest[sample.request_id]
        return column_of(tokens), tuple(rest.values())


class LiveBlocks:
    """A worker's record of a sequence's blocks in the layers with a sliding window: those that may still be read."""

    __slots__ = ("first", "ids")

    def __init__(self) -> None:
        self.first = 0
        """Number of the first of these blocks in the sequence."""
        self.ids: list[int] = []

    def put(self, sent: WindowBlocks) -> None:
        """Blocks that a plan names. Before them, blocks are kept only if none is missing in between."""
        if self.first <= sent.first <= self.first + len(self.ids):
            self.ids[sent.first - self.first :] = sent.ids
        else:
            self.first, self.ids = sent.first, list(sent.ids)

    def drop_before(self, first: int) -> None:
        """Forget the blocks before number `first`, which no step reads any more unless a plan names them again."""
        if first > self.first:
            del self.ids[: first - self.first]
            self.first = first


def _by_seat(grown: bytes) -> dict[int, tuple[int, int]]:
    """Seat -> number of a new block in its sequence, and block id."""
    if not grown:
        return {}
    numbers = integers(grown)
    return {
        seat: (number, block) for seat, number, block in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    }
