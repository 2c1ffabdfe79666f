"""Whether a re-placement that was carried out has made steps longer, on the tokens that came since: then it is undone.

Each re-placement is on trial for two windows of statistics. At the end of each window, the placement before it and the
present one are priced on the same tokens, so what else changes meanwhile does not count. The rule is pure; the
coordinator and the simulator share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic_moe.cluster.placement import Placement

MOST_HARM = 0.02
"""Share by which steps may have become longer."""

WINDOWS = 2
"""Number of windows of statistics after which a re-placement that did no harm is settled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One re-placement on trial."""

    name: str
    """Of the operation that carried it out."""
    before: Placement
    """The placement to go back to."""
    begun_s: float
    weighed: int = 0
    """Number of windows that were weighed."""
    before_s: float = 0.0
    """Seconds of a step under the placement before, times tokens, over those windows; and (below) under the one in
    force."""
    present_s: float = 0.0
    tokens: float = 0.0

    @property
    def harm(self) -> float:
        """Share by which steps have become longer; negative where they are shorter."""
        return self.present_s / self.before_s - 1 if self.before_s else 0.0

    def after(self, present_s: float, before_s: float, tokens: float) -> Trial:
        """The trial with one more window of `tokens` tokens, and the seconds of a step on them."""
        return replace(
            self,
            weighed=self.weighed + 1,
            before_s=self.before_s + tokens * before_s,
            present_s=self.present_s + tokens * present_s,
            tokens=self.tokens + tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """A re-placement to be undone, and why."""

    placement: Placement
    reason: str


class Trials:
    """The re-placements on trial, the oldest first."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._open: list[Trial] = []

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The placement before each re-placement on trial."""
        return tuple(trial.before for trial in self._open)

    def begin(self, name: str, before: Placement, now: float) -> None:
        """A re-placement has been carried out."""
        self._open.append(Trial(name=name, before=before, begun_s=now))

    def is_due(self, now: float) -> bool:
        """Whether a window of some trial is over and has not been weighed."""
        return any(now - trial.begun_s >= (trial.weighed + 1) * self.window_s for trial in self._open)

    def weigh(self, present_s: float, before_s: Sequence[float], tokens: float, now: float) -> Undo | None:
        """A window of `tokens` tokens is over, for which a step costs `present_s` seconds under the placement in force
        and `before_s` under each of `placements`. Returns what is to be undone, if anything is; all trials end then.

        A trial counts only windows that began after its re-placement. Where several are on trial, the placement that is
        gone back to is the one that suits the window best.
        """
        assert len(before_s) == len(self._open)
        with_this = [trial.after(present_s, old_s, tokens) for trial, old_s in zip(self._open, before_s, strict=True)]
        weighed = [
            counted if now - trial.begun_s >= counted.weighed * self.window_s else trial
            for trial, counted in zip(self._open, with_this, strict=True)
        ]
        if any(trial.harm > MOST_HARM for trial in weighed):
            self._open = []
            _, best = min(zip(before_s, with_this, strict=True), key=lambda pair: pair[0])
            return Undo(placement=best.before, reason=_in_words(best))
        self._open = [trial for trial in weighed if trial.weighed < WINDOWS]
        return None

    def clear(self) -> None:
        """Give up all trials: what was in force before is no placement to go back to."""
        self._open = []

    def resume(self, now: float) -> None:
        """Begin all trials again by the clock of a restarted coordinator."""
        self._open = [Trial(name=trial.name, before=trial.before, begun_s=now) for trial in self._open]


def _in_words(trial: Trial) -> str:
    window = f"{trial.weighed} windows" if trial.weighed > 1 else "window"
    return (
        f"{trial.name} had made steps {trial.harm:.1%} longer on the {trial.tokens:.0f} tokens of the {window} since,"
        f" and is undone"
    )
