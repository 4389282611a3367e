"""Only the clock: how long the rounds of FedSpine's choices take on the 80 simulated devices; nothing is trained.

Two jobs: MiniLM's first 3 layers on texts of 20 tokens, 10 devices a round, where links decide; and RoBERTa-base on texts of
128 tokens, all devices in every round, as in the paper, where computing does. The task head goes both ways. What a choice
earns is made up (a higher rank lowers the loss a little), so only times can be read here.

    python experiments/clock.py --job minilm --seeds 0 1 2 3
    python experiments/clock.py --job roberta --seeds 0 1 2 3
"""

import argparse
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedspine.control.controllers import plan_round
from fedspine.control.reward import Outcome, learn, rewards
from fedspine.fleets.hardware import Hardware, device_ids, fleet_mix
from fedspine.lm.cost import Extent
from fedspine.lm.forecast import Frame, forecast
from fedspine.lm.importance import no_scores
from fedspine.lm.prunable_layout import anatomy_of
from fedspine.lm.structure import full, shrink
from fedspine.methods.fedspine import FedSpine


@dataclass(frozen=True)
class Job:
    """What is run: the model's shapes, how long its texts are, and who takes part how often."""

    method: FedSpine
    rounds: int
    per_round: int
    layers: int
    width: int
    channels: int
    tokens: int
    head_bytes: int


JOBS = {
    "minilm": Job(
        FedSpine(ranks=(4, 8, 12, 16), steps=10, batch=16), 32, 10, 3, 384, 1536, 20, 310_000
    ),
    "roberta": Job(FedSpine(), 50, 80, 12, 768, 3072, 128, 1_180_000),
}


def choices(ranks: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
    """The bandit and what it is compared with."""
    fixed = (ranks[0], ranks[1], ranks[len(ranks) // 2 - 1], ranks[-1])
    return (
        {"choice": "bandit"},
        {"choice": "bandit", "pooled": 1.0},
        {"choice": "random"},
        *(
            {"choice": "fixed", "fixed_rank": rank, "fixed_ratio": 0.0}
            for rank in dict.fromkeys(fixed)
        ),
        {"choice": "fixed", "fixed_rank": ranks[0], "fixed_ratio": 1.0},
        {"choice": "oracle"},
        *({"choice": "deadline", "caution": caution} for caution in (0.3, 1.0, 2.0)),
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    arguments.add_argument("--job", choices=list(JOBS), default="minilm")
    wanted = arguments.parse_args()
    seeds, job = wanted.seeds, JOBS[wanted.job]
    print("| choice | seconds | waiting share | mean rank |\n|---|---|---|---|")
    for settings in choices(job.method.ranks):
        found = np.array([simulated(job, replace(job.method, **settings), seed) for seed in seeds])
        mean, spread = found.mean(0), found.std(0, ddof=1) if len(seeds) > 1 else found[0] * 0
        said = ", ".join(f"{key} = {value}" for key, value in settings.items())
        print(
            f"| {said} | {mean[0]:.0f} ± {spread[0]:.0f} | {mean[1]:.2f} | {mean[2]:.1f} |",
            flush=True,
        )


def simulated(job: Job, method: FedSpine, seed: int) -> tuple[float, float, float]:
    """Seconds of a run, the share of them that devices wait, and the mean rank."""
    sizes = {
        "num_hidden_layers": job.layers,
        "intermediate_size": job.channels,
        "hidden_size": job.width,
    }
    anatomy = anatomy_of(
        SimpleNamespace(model_type="bert", num_attention_heads=12, **sizes), "bert"
    )
    kinds = fleet_mix(None, 80)
    ids, hardware = device_ids(kinds), Hardware(seed=seed, kinds=tuple(kinds))
    rows = method.steps * method.batch
    frame = Frame(
        Extent(rows * job.tokens, rows * job.tokens**2),
        method.steps * job.layers,
        job.head_bytes,
        job.head_bytes,
    )
    state = SimpleNamespace(rounds=job.rounds, seed=seed, structures={}, reached={}, bandits={})
    rng, units, gain_scale = np.random.default_rng(seed), no_scores(anatomy), None
    turns = np.concatenate(
        [rng.permutation(80) for _ in range(job.rounds * job.per_round // 80 + 1)]
    )
    asked, now, waiting, ranks = dict.fromkeys(ids, 0), 0.0, 0.0, []
    for round in range(job.rounds):
        state.round = round

        def foresee(id: str, reached: float, wanted: Any, round: int = round) -> list[float]:
            structure = state.structures.get(id, full(anatomy))
            costs = forecast(
                anatomy, structure, frame, reached=reached, target=method.sparsity, ranks=wanted
            )
            place = ids.index(id)
            return [
                hardware.seconds(place, round=round, ask=asked[id], **vars(cost)).total
                for cost in costs
            ]

        chosen = [
            ids[i] for i in sorted(turns[round * job.per_round : (round + 1) * job.per_round])
        ]
        plans = plan_round(method, state, dict.fromkeys(chosen, len(method.ranks)), foresee)
        outcomes = {}
        for id, plan in plans.items():
            seconds = foresee(id, plan.reached, [plan.rank])[0]
            gain = (
                0.05 * np.log(plan.rank) / 3 - 0.02 * plan.progress + 0.03 * rng.standard_normal()
            )
            outcomes[id] = Outcome(
                plan, seconds, gain, importance=plan.rank**0.5, effective_rank=1.0
            )
            before = state.structures.get(id, full(anatomy))
            if plan.reached > 0:
                votes = (units.heads, units.channels)
                before = shrink(
                    anatomy, before, votes, reached=plan.reached, target=method.sparsity
                )
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
