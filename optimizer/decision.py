"""Is a re-placement worth its moves? One pure rule, for the coordinator and for the simulator.

The rule has hysteresis, so that the noise of a window does not make experts wander: a change must promise a net gain
above a threshold, which is higher the fewer tokens were counted, and after a change nothing happens for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.optimizer.core.result import PlanResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When to act. Gains are shares of the present cost of a step."""

    min_gain: float = 0.03
    """Net gain (migration paid) that a change must promise, however much was counted."""
    noise_gain: float = 0.7
    """Adds noise_gain / sqrt(tokens counted per expert): a small window finds gains that are not there."""
    cooldown_s: float = 30.0
    """Seconds after a change in which the next one waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and why."""

    worthwhile: bool
    net_gain: float
    """Share of the present cost per step that the change saves, migration paid over the horizon."""
    reason: str


def decide(
    result: PlanResult,
    *,
    tokens_per_expert: float,
    since_change_s: float | None,
    policy: Policy | None = None,
) -> Decision:
    """Whether to carry `result` out.

    `tokens_per_expert` is the mean number of tokens that an expert was chosen by in the window;
    `since_change_s` the seconds since the last change, None before the first.
    """
    policy = policy or Policy()
    if result.cost_before is None:
        return Decision(worthwhile=True, net_gain=0.0, reason="the present placement is not of these workers")
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
