from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitmill.allocation import knapsack
from bitmill.allocation.knapsack import Knapsack

ROWS = np.array([512, 1024, 3072, 8192])


def random_problem(seed: int, units: int, choices: int = 4, *, all_allowed: bool = False):
    """Weights, costs (not always falling with the weight) and allowed choices."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(ROWS, size=(units, 1)).astype(np.int64)
    weight = rows * np.arange(1, choices + 1) + rows // 8
    cost = rng.lognormal(0, 2, (units, 1)) * np.exp(-np.arange(choices))
    cost = cost * rng.lognormal(0, 0.6, (units, choices))
    allowed = rng.random((units, choices)) < 0.8
    allowed[:, 1] = True
    return weight, cost, allowed | all_allowed


def brute_force(weight, cost, allowed, capacity):
    best = np.inf
    for picks in itertools.product(*(np.flatnonzero(row) for row in allowed)):
        if sum(weight[u, c] for u, c in enumerate(picks)) <= capacity:
            best = min(best, sum(cost[u, c] for u, c in enumerate(picks)))
    return best


@pytest.fixture(params=["exact", "greedy"])
def mode(request, monkeypatch):
    if request.param == "greedy":
        monkeypatch.setattr(knapsack, "FRONTIER_UNITS", 0)
    return request.param


@pytest.mark.parametrize("seed", range(20))
def test_small_problems_against_brute_force(seed, mode):
    problem = random_problem(seed, units=1 + seed % 5)
    solver = Knapsack(*problem)
    capacity = int(solver.minimum * np.random.default_rng(seed).uniform(1, 2))
    choice = solver.solve(capacity)
    optimum = brute_force(*problem, capacity)
    assert solver.weight_of(choice) <= capacity
    assert problem[2][np.arange(len(choice)), choice].all()
    assert optimum <= solver.cost_of(choice) + 1e-12
    assert solver.cost_of(choice) <= optimum + solver.gap(capacity) + 1e-9
    if mode == "exact":
        assert solver.gap(capacity) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("units", [6, 400])
def test_more_capacity_never_costs_more(seed, units, mode):
    solver = Knapsack(*random_problem(seed, units))
    costs = []
    for share in np.linspace(1.0, 4.2, 400):
        capacity = int(solver.minimum * share)
        choice = solver.solve(capacity)
        assert solver.weight_of(choice) <= capacity
        costs.append(solver.cost_of(choice))
    assert (np.diff(costs) <= 1e-12).all()
    assert costs[-1] < costs[0]


def test_what_is_left_is_less_than_any_edge_that_still_fits():
    weight, cost, allowed = random_problem(1, 400, all_allowed=True)
    cost = np.sort(cost, axis=1)[:, ::-1].copy()
    solver = Knapsack(weight, cost, allowed)
    capacity = int(solver.minimum * 1.7)
    choice = solver.solve(capacity)
    left = capacity - solver.weight_of(choice)
    assert left < 512 * 3
    assert solver.gap(capacity) < 1e-3 * solver.cost_of(choice)


def test_a_choice_off_the_hull_is_skipped():
    weight = np.array([[1, 2, 3]] * 40, dtype=np.int64)
    cost = np.array([[10.0, 9.9, 1.0]] * 40)
    solver = Knapsack(weight, cost, np.ones((40, 3), dtype=bool))
    assert sorted(solver.solve(79).tolist()) == [0] * 21 + [2] * 19


def test_too_small_a_capacity_is_refused():
    solver = Knapsack(*random_problem(0, 3))
    with pytest.raises(ValueError, match="below the minimum"):
        solver.solve(solver.minimum - 1)


def test_a_unit_without_choices_is_refused():
    weight, cost, allowed = random_problem(0, 3)
    allowed[1] = False
    with pytest.raises(ValueError, match="at least one"):
        Knapsack(weight, cost, allowed)


def test_work_grows_with_edges_not_with_capacity():
    """49,000 groups of six widths: the hulls are walked at most B - 1 times, edges sorted once."""
    solver = Knapsack(*random_problem(3, 49_000, 6, all_allowed=True))
    assert len(solver.edges.unit) <= 49_000 * 5
    choice = solver.solve(solver.minimum * 2)
    assert solver.weight_of(choice) > 0.9999 * solver.minimum * 2
