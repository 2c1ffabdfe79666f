"""Which group a request goes to: one that serves, that knows the longest prefix of the prompt, and is not too busy.

Each replica chooses by itself, and hears of the others' requests once a second. Meanwhile it takes the others to place
requests as it does itself, or a burst would go to the group that had the fewest before.

Pure. What groups know is kept as this replica has sent it to them: keys of the chunks of prompts and answers. It may be
wrong, as a group forgets what it has no room for, and as other replicas send prompts too. Then a prompt is computed
that another group had, and nothing else is lost.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from elastic_moe.cluster.facts.facts import Choice
from elastic_moe.cluster.lines import counted

CHUNK = 32
"""Tokens of a chunk. Prefixes are told apart by whole chunks."""
MOST_TOKENS = 8192
"""Tokens from the beginning of a sequence that are looked at: hashing them takes less than a millisecond."""
MOST_CHUNKS = 65536
"""Most chunks that are remembered, some 2 million tokens in 12 MB."""
BUSIER = 1.5
"""A group with so many times the requests per worker of the least busy one, and SLACK more, is too busy for a prefix to
count."""
SLACK = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    serves: bool
    requests: int
    """Running and waiting ones."""
    workers: int = 1

    @property
    def load(self) -> float:
        """Requests per worker."""
        return self.requests / max(1, self.workers)


def choose(groups: Sequence[GroupState], known: Sequence[int], name: str) -> Choice[int | None]:
    """The number of the group for a request of this name; None while no group serves. known: tokens of its prompt that
    each group knows. Of equal groups the name chooses: replicas that all began with the first would fill that one."""
    serving = [number for number, group in enumerate(groups) if group.serves]
    if not serving:
        return Choice(None, "no group serves")
    least = min(groups[number].load for number in serving)
    free = [number for number in serving if groups[number].load <= BUSIER * least + SLACK]
    worth = {number: (-known[number], groups[number].load) for number in free}
    most = min(worth.values())
    best = _drawn([number for number in free if worth[number] == most], name)
    assert best is not None
    if known[best]:
        return Choice(best, f"it knows {counted(known[best], 'token')} of the prompt")
    return Choice(best, "it has the fewest requests for each worker")


def by_name(groups: Sequence[GroupState], name: str) -> Choice[int | None]:
    """The same for a lasting request, which all replicas must look for in the same group. Groups that come and go move
    only the requests that were, or will be, theirs (rendezvous hashing)."""
    serving = [number for number, group in enumerate(groups) if group.serves]
    best = _drawn(serving, name)
    return Choice(best, "no group serves" if best is None else "its name says so")


def _drawn(numbers: Iterable[int], name: str) -> int | None:
    return max(numbers, key=lambda number: blake2b(f"{number}:{name}".encode()).digest(), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an engine has said last."""

    others: int = 0
    """Requests of other API replicas."""
    workers: int = 1
    replicas: int = 1
    """API replicas that are connected, this one included."""


_NOTHING = Report()


class Loads:
    """What each group has to do, as one replica knows it."""

    def __init__(self) -> None:
        self._reports: dict[int, Report] = {}
        self._fresh: dict[int, set[str]] = {}
        """Names of this replica's requests that a group was given after its last report."""

    def placed(self, group: int, name: str) -> None:
        self._fresh.setdefault(group, set()).add(name)

    def left(self, group: int, name: str) -> None:
        """A request has ended, or moved away."""
        self._fresh.get(group, set()).discard(name)

    def asked(self, group: int) -> frozenset[str]:
        """The group's engine is asked for a report now. Returns what `told` needs: requests that it will count."""
        return frozenset(self._fresh.get(group, ()))

    def told(self, group: int, report: Report, counted: Collection[str]) -> None:
        self._reports[group] = report
        self._fresh.get(group, set()).difference_update(counted)

    def forget(self, group: int) -> None:
        """The group is lost: what its next engine has is not known."""
        self._reports.pop(group, None)
        self._fresh.pop(group, None)

    def state(self, group: int, own: int, *, serves: bool) -> GroupState:
        """own: requests of this replica in the group."""
        report = self._reports.get(group, _NOTHING)
        likely = (report.replicas - 1) * len(self._fresh.get(group, ()))
        return GroupState(serves=serves, requests=own + report.others + likely, workers=report.workers)


def chunk_keys(token_ids: Sequence[int], salt: str) -> list[bytes]:
    """A key for each whole chunk at the beginning. Equal keys mean equal tokens up to there, and equal salt."""
    key = blake2b(salt.encode(), digest_size=16).digest()
    tokens = array("q", token_ids[:MOST_TOKENS])
    keys = []
    for end in range(CHUNK, len(tokens) + 1, CHUNK):
        key = blake2b(key + tokens[end - CHUNK : end].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class KnownPrefixes:
    """Which groups have had which chunks. The chunks that were met least recently are forgotten first."""

    def __init__(self, groups: int, most: int = MOST_CHUNKS) -> None:
        self.groups = groups
        """Number of groups."""
        self._most = most
        self._having: dict[bytes, int] = {}
        """The groups that have a chunk: bit n stands for group n. Ordered by when chunks were met."""

    def __len__(self) -> int:
        return len(self._having)

    def known(self, keys: Iterable[bytes]) -> list[int]:
        """Number of tokens at the beginning of a sequence that each group knows. keys: as `chunk_keys` has them."""
        tokens = [0] * self.groups
        having = (1 << self.groups) - 1
        for key in keys:
            having &= self._having.get(key, 0)
            if not having:
                break
            for number in range(self.groups):
                tokens[number] += CHUNK if having >> number & 1 else 0
        return tokens

    def learn(self, keys: Iterable[bytes], group: int) -> None:
        """The group has these chunks from now on."""
        for key in keys:
            # met now, so it moves to the end
            self._having[key] = self._having.pop(key, 0) | 1 << group
        while len(self._having) > self._most:
            del self._having[next(iter(self._having))]

    def forget(self, group: int) -> None:
        """The group has lost what it knew."""
        others = ~(1 << group)
        self._having = {key: left for key, having in self._having.items() if (left := having & others)}
