"""The rule whether a re-placement is worth its moves. It is pure; the coordinator and the simulator share it.

The rule has hysteresis, so that the noise of a window does not make experts wander. A change must promise a net gain
above a threshold, which is the higher the fewer tokens were counted. After a change, the next one waits for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.optimizer.core.result import PlanResult

MOVE_SHARE = 0.18
"""Largest share of all experts that one change moves, where nobody asks for another. It is about a quarter of what a
plan from scratch moves; on real traces such a change keeps over 80 % of that plan's gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The thresholds of the rule. Gains are shares of the present cost of a step."""

    min_gain: float = 0.03
    """Least net gain (after the cost of migration) that a change must promise, however many tokens were counted."""
    noise_gain: float = 0.7
    """The least gain rises by noise_gain / sqrt(tokens counted per expert): a small window shows gains that are not
    real."""
    cooldown_s: float = 30.0
    """Seconds after a change before the next one may begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to carry a plan out, and the reason."""

    worthwhile: bool
    net_gain: float
    """Share of the present cost of a step that the change saves, after the cost of migration, spread over the
    horizon."""
    reason: str


def decide(
    result: PlanResult,
    *,
    tokens_per_expert: float,
    since_change_s: float | None,
    policy: Policy | None = None,
) -> Decision:
    """Decide whether to carry `result` out.

    `tokens_per_expert` is the mean number of tokens that an expert was chosen by in the window;
    `since_change_s` is the number of seconds since the last change, None before the first.
    """
    policy = policy or Policy()
    if result.cost_before is None:
        return Decision(worthwhile=True, net_gain=0.0, reason="the present placement is for other workers")
    before = result.cost_before.total_s
    gain = (before - result.cost.total_s) / before
    needed = policy.min_gain + policy.noise_gain / max(tokens_per_expert, 1e-9) ** 0.5
    if result.moves == 0:
        return Decision(worthwhile=False, net_gain=0.0, reason="nothing to move")
    if since_change_s is not None and since_change_s < policy.cooldown_s:
        wait_s = policy.cooldown_s - since_change_s
        return Decision(worthwhile=False, net_gain=gain, reason=f"gain {gain:.1%}, but cooling down for {wait_s:.0f} s")
    if gain < needed:
        return Decision(worthwhile=False, net_gain=gain, reason=f"gain {gain:.1%} is below the {needed:.1%} asked for")
    return Decision(
        worthwhile=True,
        net_gain=gain,
        reason=f"gain {gain:.1%} of a step for {result.moves} moves, above the {needed:.1%} asked for",
    )
