"""Tiers in the problem: their price against loops, the choice against every choice, the plans against brute force."""

import dataclasses
from itertools import count

import numpy as np
import pytest

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.placement import EMPTY, Placement, Tier, contiguous
from elastic_moe.optimizer import PLANNERS, plan
from elastic_moe.optimizer.baselines.heuristics import greedy_table, random_table
from elastic_moe.optimizer.core.bounds import lower_bound
from elastic_moe.optimizer.core.contract import Budget, Draft
from elastic_moe.optimizer.core.cost import expected_fetches, price, price_table, shares
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.core.table import to_placement
from elastic_moe.optimizer.core.tiering import LevelArray
from elastic_moe.optimizer.ilp.planner import improved
from elastic_moe.optimizer.residency.memory import WorkerMemory, kv_price_s
from elastic_moe.optimizer.search.layer_prices import LayerPricer
from elastic_moe.optimizer.search.local_search import JointSearch
from elastic_moe.optimizer.search.swaps import BARRED, swap_deltas
from tests.optimizer.cases import every_table, tiny
from tests.optimizer.tier_cases import US, every_level, tiered_optimum, tight

RNG = np.random.default_rng(0)


def stall_by_loops(problem: PlacementProblem, table: np.ndarray, levels: LevelArray) -> float:
    x, tiering = shares(problem, table), problem.tiering
    assert tiering is not None
    total, width = 0.0, len(problem.workers)
    for layer in range(problem.num_layers):
        tokens = problem.loads[layer].sum() / problem.top_k
        fetch, busy, units = [], [], []
        for rank, memory in enumerate(problem.memory):
            seconds, load, unit = 0.0, 0.0, np.zeros(problem.num_experts)
            token_s = 1e9 if memory.host_token_s is None else memory.host_token_s
            for expert in range(problem.num_experts):
                chance = problem.loads[layer, expert] / tokens * x[layer, expert, rank]
                active = 1 - (1 - chance) ** problem.tokens_per_step
                prices = {
                    Tier.DEVICE: 0.0,
                    Tier.HOST: min(active * memory.host_fetch_s, chance * problem.tokens_per_step * token_s),
                    Tier.DISK: active * memory.disk_fetch_s,
                }
                price = prices.get(levels[layer, expert, rank], 0.0)
                seconds += price
                unit[expert] = price / max(tiering.active[layer, expert], 1e-300)
                load += chance * problem.tokens_per_step
            fetch.append(seconds)
            units.append(unit)
            busy.append(load * problem.token_expert_s / problem.speed[rank])
        cover, both = tiering.covariance[layer], sum(units)
        variance = sum(unit @ cover @ unit for unit in units) - both @ cover @ both / width
        spread = tiering.slope[layer] * sum(fetch) + tiering.steep[layer] * variance
        total += max(0.0, max(fetch) + spread - max(busy))
    return total


@pytest.mark.parametrize(("seed", "host", "computes"), [(0, 0, False), (1, 1, False), (2, 1, True), (3, 2, True)])
def test_the_price_is_that_of_the_docstring(seed: int, host: int, computes: bool) -> None:
    problem = tight(seed, host=host, slots=(3, 2))
    if computes:
        memory = dataclasses.replace(problem.memory[0], host_token_s=3 * US)
        problem = dataclasses.replace(problem, memory=(memory,) * 2)
    assert problem.tiering is not None
    table = random_table(problem, np.random.default_rng(seed))
    levels = problem.tiering.levels(shares(problem, table))
    cost = price_table(problem, table)
    assert cost.stall_s == pytest.approx(stall_by_loops(problem, table, levels))
    assert cost.step_s - cost.stall_s == pytest.approx(
        price_table(dataclasses.replace(problem, memory=()), table).step_s
    )


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_dealt_misses_are_priced_as_they_end(tokens: int) -> None:
    """M misses of which every worker fetches its share end when the next whole number of M / W is fetched."""
    problem = tight(0, device=2, experts=12, layers=1, workers=3, slots=(4, 4, 4), tokens_per_step=tokens, dealt=True)
    tiering = problem.tiering
    assert tiering is not None
    x = shares(problem, np.arange(12)[None])
    [levels] = tiering.levels(x)
    chances = tiering.active[0][(levels == Tier.DISK).any(axis=1)]
    misses = (np.random.default_rng(0).random((20_000, len(chances))) < chances).sum(axis=1)
    [waits] = tiering.waits(x, levels[None])
    assert waits == pytest.approx(np.ceil(misses / 3).mean() * 50 * US, rel=0.12)
    shared = dataclasses.replace(problem, dealt=False, shared_disk=True).tiering
    assert shared is not None
    assert shared.waits(x, levels[None])[0] == pytest.approx(misses.mean() * 50 / 3 * US, rel=0.02)
    apart = dataclasses.replace(problem, dealt=False).tiering
    assert apart is not None
    assert apart.waits(x, levels[None])[0] > waits


@pytest.mark.parametrize(
    ("seed", "device", "host", "rent_s"),
    [(0, 2, 0, 0), (1, 3, 0, 0), (2, 4, 1, 0), (3, 5, 2, 0), (4, 2, 1, 0), (5, 6, 0, 15 * US), (6, 5, 1, 30 * US)],
)
def test_a_worker_keeps_what_saves_most(seed: int, device: int, host: int, rent_s: float) -> None:
    """With one worker there is no slowest one to wait for, and the choice is the best of all."""
    problem = tight(seed, experts=3, workers=1, slots=(3,), device=device, host=host, rent_s=rent_s)
    table = np.tile(np.arange(3), (2, 1))
    best = min(price_table(problem, table, levels).total_s for levels in every_level(problem, table))
    assert price_table(problem, table).total_s == pytest.approx(best, rel=1e-9)


def test_a_placement_has_the_tiers_that_were_priced() -> None:
    problem = tight(3, device=3, host=1, layers=2, experts=6, workers=2)
    table = greedy_table(problem, RNG)
    placement = to_placement(problem, table)
    assert not placement.all_resident
    assert price(problem, placement).stall_s == pytest.approx(price_table(problem, table).stall_s)
    for worker in placement.workers:
        tiers = [tier for layer in range(2) for tier in placement.tiers_of(worker.id, layer)]
        assert tiers.count(Tier.DEVICE) == 1, "one slot of each layer is for the experts that pass"
        assert tiers.count(Tier.HOST) == 1
    assert price(problem, Placement.from_dict(placement.to_dict())) == price(problem, placement)
    worse = dataclasses.replace(placement, tiers=np.where(placement.tiers == Tier.DEVICE, Tier.DISK, Tier.DEVICE))
    assert price(problem, worse).stall_s > price(problem, placement).stall_s


def test_a_cache_area_keeps_its_slots_and_is_priced_as_if_it_held_the_best() -> None:
    small, large = (tight(5, device=8, cache=cache, layers=2, experts=12) for cache in (1, 2))
    table = greedy_table(small, RNG)
    pins = [int((to_placement(problem, table).tiers == Tier.DEVICE).sum()) for problem in (small, large)]
    assert pins == [12, 8], "two slots of each layer and worker are free instead of one"
    assert price_table(large, table) == price_table(small, table)
    assert price(large, to_placement(large, table)).stall_s == pytest.approx(price_table(small, table).stall_s)


def test_what_one_expert_leaves_out_fits_into_the_slot_for_those_that_pass() -> None:
    problem = tight(1, device=4, layers=2, experts=5, slots=(3, 2))
    placement = to_placement(problem, np.array([[0, 1, 2, 3, 4]] * 2))
    held = [[len(placement.resident(worker.id, layer)) for layer in range(2)] for worker in placement.workers]
    assert sorted(held[0]) == [0, 3]
    assert held[1] == [2, 2], "the second worker's experts all fit"


@pytest.mark.parametrize("planner", PLANNERS)
def test_where_everything_fits_memories_change_nothing(planner: str) -> None:
    """Bit for bit: the same tables, costs and bounds."""
    workers = tiny(2, layers=1, slots=(3, 2)).workers
    plain = tiny(2, layers=1, slots=(3, 2), current=contiguous(1, 4, workers), expert_bytes=10**3)
    memory = tuple(WorkerMemory(device_experts=experts, disk_fetch_s=1.0) for experts in (3, 2))
    roomy = dataclasses.replace(plain, memory=memory)
    assert roomy.tiering is None
    one, other = (plan(each, planner=planner, deadline_s=2, clock=count(0, 1e-3).__next__) for each in (plain, roomy))
    assert one.placement == other.placement
    assert one.placement.all_resident
    for name in ("cost", "cost_before", "lower_bound", "moves", "imbalance"):
        assert getattr(one, name) == getattr(other, name)
    assert one.cost.stall_s == 0


@pytest.mark.parametrize(
    ("seed", "device", "host", "tokens", "dealt"),
    [(0, 2, 0, 1, False), (1, 2, 1, 4, False), (2, 3, 0, 64, False), (3, 3, 1, 4, False), (4, 2, 0, 4, True)],
)
def test_no_table_and_no_tiers_beat_the_bound(seed: int, device: int, host: int, tokens: int, dealt: bool) -> None:
    problem = tight(seed, device=device, host=host, tokens_per_step=tokens, dealt=dealt)
    rng = np.random.default_rng(seed)
    tables = list(every_table(problem))
    chosen = [tables[int(k)] for k in rng.integers(len(tables), size=3)]
    best = min(
        price_table(problem, table, levels).total_s for table in chosen for levels in every_level(problem, table)
    )
    assert lower_bound(problem) <= best * (1 + 1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {"device": 2, "experts": 3, "slots": (2, 1)},
        {"device": 3, "host": 1, "layers": 1, "slots": (3, 2)},
        {"device": 2, "experts": 3, "slots": (2, 2), "layers": 1},
        {"device": 3, "slots": (3, 2), "layers": 1, "tokens_per_step": 1},
        {"device": 2, "layers": 1, "workers": 3, "slots": (2, 2, 1), "experts": 4, "caution": 0.0},
        {"device": 5, "experts": 3, "slots": (2, 1), "layers": 1, "rent_s": 20 * US},
        {"device": 2, "experts": 3, "slots": (2, 1), "dealt": True},
        {"device": 2, "layers": 1, "workers": 3, "slots": (2, 2, 1), "experts": 4, "caution": 0.0, "dealt": True},
    ],
)
def test_the_ilp_proves_the_brute_force_optimum(fields: dict[str, object]) -> None:
    problem = tight(11, **fields)
    best, start = tiered_optimum(problem), greedy_table(problem, RNG)
    proven = improved(problem, Draft(table=start, reason=""), Budget.of(60))
    assert price_table(problem, proven.table, proven.levels).total_s == pytest.approx(best, rel=1e-6)
    assert proven.bound == pytest.approx(best, rel=1e-6)
    search = JointSearch(problem, start)
    search.sweep(Budget.of(60))
    search.shake(Budget.of(60), 20)
    assert search.total_s >= best * (1 - 1e-9)
    if problem.num_slots == problem.num_experts:
        assert search.total_s <= best * 1.02


def test_moves_are_what_comes_into_a_device() -> None:
    workers = tight(4, experts=6).workers
    current = contiguous(2, 6, workers)
    pins = np.zeros((2, 6), dtype=np.int8)
    pins[:, 1:3] = pins[:, 4:] = Tier.DISK
    current = dataclasses.replace(current, tiers=pins)
    problem = tight(4, experts=6, device=4, current=current, expert_bytes=10, move_budget=1)
    result = plan(problem, deadline_s=2)
    assert result.moves <= 1
    assert result.bytes == 10 * result.moves
    assert result.cost.step_s <= result.cost_before.step_s * (1 + 1e-12)
    assert plan(dataclasses.replace(problem, move_budget=0), deadline_s=1).moves == 0


@pytest.mark.parametrize(("seed", "host", "slots"), [(0, 0, (4, 4)), (1, 1, (4, 4)), (2, 3, (5, 4)), (3, 0, (7, 3))])
def test_swaps_see_the_change_of_what_is_fetched(seed: int, host: int, slots: tuple[int, int]) -> None:
    problem = tight(seed, device=2, experts=8, layers=1, slots=slots, host=host, tokens_per_step=2)
    table = random_table(problem, np.random.default_rng(seed))
    pricer = LayerPricer(problem, table)
    terms = pricer.terms(0, 9, 5)
    fetch = terms.fetch
    assert fetch is not None
    share = (table[0] != EMPTY).astype(float)
    held = np.bincount(problem.owner, share, 2).astype(int)
    seen = fetch.swap_changes(fetch.chance[table[0]] * share, held, problem.owner, terms.first_slot)
    before = fetch.prices(pricer.x[0]).sum(axis=0)
    for i, j in zip(*np.nonzero(swap_deltas(terms, table[0]) != BARRED), strict=True):
        swapped = table.copy()
        swapped[0, [i, j]] = swapped[0, [j, i]]
        after = fetch.prices(shares(problem, swapped)[0]).sum(axis=0)
        if (swapped[0, [i, j]] != EMPTY).all():
            rank = problem.owner[i]
            assert seen[i, j] == pytest.approx(after[rank] - before[rank], abs=1e-12)


def test_an_expert_that_is_not_worth_its_kv_cache_stays_outside() -> None:
    """Although every device has room for all."""
    free, dear = (tight(2, device=40, experts=12, tokens_per_step=1, rent_s=rent_s) for rent_s in (0.0, 5 * US))
    assert free.tiering is None
    results = [plan(problem, planner="greedy", deadline_s=2) for problem in (free, dear)]
    assert results[0].placement.all_resident
    placement = results[1].placement
    assert 0 < placement.resident_share < 1
    slots = int((placement.tiers == Tier.DEVICE).sum()) + sum(
        any(placement.tiers_of(worker.id, layer)) for worker in placement.workers for layer in range(2)
    )
    assert results[1].cost.kv_s == pytest.approx(slots * 5 * US)
    assert lower_bound(dear) <= results[1].cost.total_s


def test_the_price_of_kv_cache_is_that_of_the_tokens_that_it_would_hold() -> None:
    assert kv_price_s(step_s=0.1, step_tokens=10, expert_bytes=5e6, sequence_bytes=20e6) == pytest.approx(0.1 / 10 / 4)


def test_expected_fetches() -> None:
    problem = tight(2, device=3, experts=8, tokens_per_step=1)
    placement = to_placement(problem, greedy_table(problem, RNG))
    fetches = expected_fetches(problem, placement)
    assert fetches.resident_share == pytest.approx(2 / 16)
    chance = problem.loads / problem.tokens[:, None]
    missing = [
        chance[layer, e]
        for layer in range(2)
        for e, tier in zip(placement.physical_to_logical_map[layer], placement.tiers[layer], strict=True)
        if e != EMPTY and tier
    ]
    assert fetches.experts == pytest.approx(sum(missing))
    assert fetches.misses == pytest.approx(sum(missing) / (2 * problem.top_k))


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"device_experts": 1}, "memory.device_experts: expected at least 2, one for each layer, got 1"),
        ({"host_experts": -1}, "memory.host_experts: expected at least 0, got -1"),
        ({"cache_slots": 0}, "memory.cache_slots: expected at least 1, got 0"),
        ({"disk_fetch_s": float("nan")}, "memory.disk_fetch_s: expected at least 0 seconds, got nan"),
    ],
)
def test_wrong_memories_are_refused(memory: dict[str, float], said: str) -> None:
    good = {"device_experts": 4, "disk_fetch_s": 1.0}
    with pytest.raises(PlacementError, match=said):
        tiny(memory=(WorkerMemory(**(good | memory)),) * 2)
    with pytest.raises(PlacementError, match="memory: expected 2 numbers, one per worker, got 1"):
        tiny(memory=(WorkerMemory(**good),))
