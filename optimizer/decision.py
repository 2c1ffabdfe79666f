"""The rule whether a re-placement is worth its moves. It is pure; the coordinator and the simulator share it.

Where subjects are remembered, a plan has two gains: the one on what was seen, which the present window shows, and the
one that lasts, for the present and the remembered subjects together, which is what the plan is priced for. The second
must be above the threshold, and the first must be no loss to speak of.

The rule has hysteresis, so that the noise of a window does not make experts wander. A change must promise a net gain
above a threshold, which is the higher the fewer tokens were counted. After a change, the next one waits for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.cluster.lines import counted
from elastic_moe.optimizer.core.result import PlanResult

MOVE_SHARE = 0.18
"""Largest share of all experts that one change moves, where nobody asks for another. It is about a quarter of what a
plan from scratch moves; on real traces such a change keeps over 80 % of that plan's gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The thresholds of the rule. Gains are shares of the present cost of a step."""

    min_gain: float = 0.015
    """Least net gain (after the cost of migration) that a change must promise, however many tokens were counted."""
    noise_gain: float = 0.3
    """The least gain rises by noise_gain / sqrt(tokens counted per expert): a small window shows gains that are not
    real."""
    most_loss: float = 0.01
    """Largest loss on what was seen, after the cost of migration, for a gain that lasts."""
    cooldown_s: float = 30.0
    """Seconds after a change before the next one may begin."""


RELIEF = Policy(min_gain=0.03, noise_gain=0.2, cooldown_s=0.0)
"""The thresholds for the few moves that answer a change of subject at once. They take a part of a large excess, which
few tokens show well enough, and what they cost is little."""

SETTLING = Policy(cooldown_s=0.0)
"""The thresholds of the looks soon after a change of subject, which follow one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to carry a plan out, and the reason."""

    worthwhile: bool
    net_gain: float
    """Share of the present cost of a step that the change saves, after the cost of migration, spread over the
    horizon: for all subjects that the plan was priced for."""
    seen_gain: float
    """The same on what was seen in the window."""
    reason: str


def decide(
    result: PlanResult,
    *,
    tokens_per_expert: float,
    since_change_s: float | None,
    present_share: float = 1.0,
    policy: Policy | None = None,
) -> Decision:
    """Decide whether to carry `result` out.

    `tokens_per_expert` is the mean number of tokens that an expert was chosen by in the window;
    `since_change_s` is the number of seconds since the last change, None before the first; `present_share` is the
    weight of the window in the plan's price, beside the remembered subjects. A gain on the window counts by that share,
    and so does the threshold.
    """
    policy = policy or Policy()
    if result.cost_before is None:
        reason = "the present placement is for other workers"
        return Decision(worthwhile=True, net_gain=0.0, seen_gain=0.0, reason=reason)
    before = result.cost_before.total_s
    gain = (before - result.cost.total_s) / before
    seen = (result.each_before[0] - result.each[0] - result.cost.migration_s) / result.each_before[0]
    if len(result.each) == 1:
        seen = gain
    needed = present_share * (policy.min_gain + policy.noise_gain / max(tokens_per_expert, 1e-9) ** 0.5)
    worthwhile, reason = False, ""
    summary = f"gain {gain:.1%}"
    if len(result.each) > 1:
        others = len(result.each) - 1
        subjects = counted(others, "remembered subject")
        summary = f"gain {gain:.1%} with {subjects} ({seen:.1%} on what was seen)"
    if result.moves == 0:
        return Decision(worthwhile=False, net_gain=0.0, seen_gain=0.0, reason="nothing to move")
    if since_change_s is not None and since_change_s < policy.cooldown_s:
        reason = f"{summary}, {since_change_s:.0f} s after the last change (the cool-down is {policy.cooldown_s:.0f} s)"
    elif gain < needed:
        reason = f"{summary} is below the {needed:.1%} asked for"
    elif seen < -policy.most_loss:
        reason = f"{summary}, which is a loss of more than {policy.most_loss:.1%} now"
    else:
        worthwhile = True
        reason = f"{summary} of a step for {counted(result.moves, 'move')}, above the {needed:.1%} asked for"
    return Decision(worthwhile=worthwhile, net_gain=gain, seen_gain=seen, reason=reason)
