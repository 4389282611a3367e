"""Whose turn it is."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from fedspine.runs.assemble import cohort
from fedspine.runs.config import load

RECIPE = load(None)


def recipe_for(devices, per_round, seed=0):
    fleet = RECIPE.fleet.model_copy(update={"devices": devices, "per_round": per_round})
    return replace(RECIPE, fleet=fleet, run=RECIPE.run.model_copy(update={"seed": seed}))


@given(devices=some.integers(1, 40), per_round=some.integers(1, 50), rounds=some.integers(1, 60))
def test_everybody_is_asked_equally_often(devices, per_round, rounds) -> None:
    recipe = recipe_for(devices, per_round)
    asked = np.zeros(devices, int)
    for round in range(rounds):
        chosen = cohort(recipe, round)
        assert len(set(chosen.tolist())) == len(chosen) == min(per_round, devices)
        asked[chosen] += 1
        assert asked.max() - asked.min() <= 1


def test_turns_differ_by_seed_and_from_pass_to_pass() -> None:
    passes = [
        np.stack([cohort(recipe_for(80, 10, seed), round) for round in range(16)])
        for seed in (0, 1)
    ]
    assert (passes[0] != passes[1]).any()
    assert (passes[0][:8] != passes[0][8:]).any()


def test_late_rounds_cost_no_more_than_early_ones() -> None:
    assert len(cohort(recipe_for(4, 3), 10**6)) == 3
