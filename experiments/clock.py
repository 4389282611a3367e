"""Only the clock: how long the rounds of FedSpine's choices take on the 80 simulated devices; nothing is trained.

Shapes are those of MiniLM's first 3 layers, texts of 20 tokens, and a task head of 300 kB that goes both ways. What a choice
earns is made up (a higher rank lowers the loss a little), so only times can be read here.

    python experiments/clock.py --seeds 0 1 2 3
"""

import argparse
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedspine.fleets.hardware import Hardware, device_ids, fleet_mix
from fedspine.lm.anatomy import anatomy_of
from fedspine.lm.cost import Extent
from fedspine.lm.forecast import Frame, forecast
from fedspine.lm.importance import no_scores
from fedspine.lm.structure import full, shrink
from fedspine.methods.fedspine import FedSpine
from fedspine.planning.choice import plan_round
from fedspine.planning.outcome import Outcome, learn, rewards

ROUNDS, PER_ROUND, LAYERS, TOKENS, HEAD_BYTES = 32, 10, 3, 20, 310_000
CHOICES: tuple[dict[str, Any], ...] = (
    {"choice": "bandit"},
    {"choice": "random"},
    *({"choice": "fixed", "fixed_rank": rank, "fixed_ratio": 0.0} for rank in (4, 8, 16)),
    {"choice": "oracle"},
    *({"choice": "deadline", "caution": caution} for caution in (0.3, 1.0, 2.0)),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    seeds = arguments.parse_args().seeds
    print("| choice | seconds | waiting share | mean rank |\n|---|---|---|---|")
    for settings in CHOICES:
        method = replace(FedSpine(ranks=(4, 8, 12, 16), steps=10, batch=16), **settings)
        found = np.array([simulated(method, seed) for seed in seeds])
        mean, spread = found.mean(0), found.std(0, ddof=1) if len(seeds) > 1 else found[0] * 0
        said = ", ".join(f"{key} = {value}" for key, value in settings.items())
        print(f"| {said} | {mean[0]:.0f} ± {spread[0]:.0f} | {mean[1]:.2f} | {mean[2]:.1f} |", flush=True)


def simulated(method: FedSpine, seed: int) -> tuple[float, float, float]:
    """Seconds of a run, the share of them that devices wait, and the mean rank."""
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": 12, "intermediate_size": 1536, "hidden_size": 384}
    anatomy = anatomy_of(SimpleNamespace(model_type="bert", **shape), "bert")
    kinds = fleet_mix(None, 80)
    ids, hardware = device_ids(kinds), Hardware(seed=seed, kinds=tuple(kinds))
    rows = method.steps * method.batch
    frame = Frame(Extent(rows * TOKENS, rows * TOKENS**2), method.steps * LAYERS, HEAD_BYTES, HEAD_BYTES)
    state = SimpleNamespace(rounds=ROUNDS, seed=seed, structures={}, reached={}, bandits={})
    rng, units, gain_scale = np.random.default_rng(seed), no_scores(anatomy), None
    turns = np.concatenate([rng.permutation(80) for _ in range(ROUNDS * PER_ROUND // 80 + 1)])
    asked, now, waiting, ranks = dict.fromkeys(ids, 0), 0.0, 0.0, []
    for round in range(ROUNDS):
        state.round = round

        def foresee(id: str, reached: float, wanted: Any, round: int = round) -> list[float]:
            structure = state.structures.get(id, full(anatomy))
            costs = forecast(anatomy, structure, frame, reached=reached, target=method.sparsity, ranks=wanted)
            place = ids.index(id)
            return [hardware.seconds(place, round=round, ask=asked[id], **vars(cost)).total for cost in costs]

        chosen = [ids[i] for i in sorted(turns[round * PER_ROUND : (round + 1) * PER_ROUND])]
        plans = plan_round(method, state, dict.fromkeys(chosen, len(method.ranks)), foresee)
        outcomes = {}
        for id, plan in plans.items():
            seconds = foresee(id, plan.reached, [plan.rank])[0]
            gain = 0.05 * np.log(plan.rank) / 3 - 0.02 * plan.progress + 0.03 * rng.standard_normal()
            outcomes[id] = Outcome(plan, seconds, gain, importance=plan.rank**0.5, effective_rank=1.0)
            before = state.structures.get(id, full(anatomy))
            if plan.reached > 0:
                votes = (units.heads, units.channels)
                before = shrink(anatomy, before, votes, reached=plan.reached, target=method.sparsity)
            state.structures[id] = before
            asked[id] += 1
            ranks.append(plan.rank)
        earned, gain_scale = rewards(method, outcomes, gain_scale)
        state.bandits |= learn(method, state.bandits, outcomes, earned)
        state.reached |= {id: plan.reached for id, plan in plans.items()}
        spent = np.array([outcome.seconds for outcome in outcomes.values()])
        now, waiting = now + spent.max(), waiting + (spent.max() - spent).mean()
    return now, waiting / now, float(np.mean(ranks))


if __name__ == "__main__":
    main()
