"""Only the clock: how long FedSpine's rounds take under each controller on simulated devices;
nothing is trained.

Three jobs: MiniLM's first 3 layers on texts of 20 tokens, 10 of 80 devices a round, where links
decide; RoBERTa-base on texts of 128 tokens, all 80 devices in every round, as in the paper, where
computing does; and the same with 16 devices in each of 100 rounds, where a bandit sees each device
often. The task head goes both ways. What a plan earns is made up (a higher rank lowers the loss a
little), so only times can be read here.

    python experiments/clock.py --job minilm --seeds 0 1 2 3
    python experiments/clock.py --job roberta --seeds 0 1 2 3
    python experiments/clock.py --job few --seeds 0 1 2 3 --bandits
"""

import argparse
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedspine.control.bandit import rewards
from fedspine.control.controllers import Controller, Deadline, Fixed, Oracle, Random, SUcb
from fedspine.control.plan import PlanResult
from fedspine.fleets.hardware import Hardware, device_ids, fleet_mix
from fedspine.lm.cost import Extent
from fedspine.lm.forecast import Frame, forecast
from fedspine.lm.importance import no_scores
from fedspine.lm.prunable_layout import layout_of
from fedspine.lm.structure import full, shrink
from fedspine.methods.fedspine import FedSpine


@dataclass(frozen=True)
class Job:
    """What is run: the model's shapes, how long its texts are, and who takes part how often."""

    method: FedSpine
    devices: int
    rounds: int
    per_round: int
    layers: int
    width: int
    channels: int
    tokens: int
    head_bytes: int


JOBS = {
    "minilm": Job(
        FedSpine(ranks=(4, 8, 12, 16), steps=10, batch=16), 80, 32, 10, 3, 384, 1536, 20, 5_000
    ),
    "roberta": Job(FedSpine(), 80, 50, 80, 12, 768, 3072, 128, 1_180_000),
    "few": Job(FedSpine(), 16, 100, 16, 12, 768, 3072, 128, 1_180_000),
}


def controllers(ranks: tuple[int, ...]) -> tuple[Controller, ...]:
    """The bandit and what it is compared with."""
    fixed = (ranks[0], ranks[1], ranks[len(ranks) // 2 - 1], ranks[-1])
    return (
        SUcb(),
        Random(),
        *(Fixed(ratio=0.0, rank=rank) for rank in dict.fromkeys(fixed)),
        Fixed(ratio=1.0, rank=ranks[0]),
        Oracle(),
        *(Deadline(latency_margin=margin) for margin in (0.3, 1.0, 2.0)),
    )


# the bandit with one of its settings changed
BANDITS = (
    SUcb(exploration=0.0),
    SUcb(exploration=1.0),
    SUcb(discount=0.5),
    SUcb(discount=1.0),
    SUcb(split_at=8.0),
    SUcb(max_tree_depth=1),
    SUcb(max_tree_depth=4),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    arguments.add_argument("--job", choices=list(JOBS), default="minilm")
    arguments.add_argument("--bandits", action="store_true", help="also the bandit's settings")
    wanted = arguments.parse_args()
    seeds, job = wanted.seeds, JOBS[wanted.job]
    print("| controller | seconds | waiting share | mean rank |\n|---|---|---|---|")
    for controller in (*controllers(job.method.ranks), *(BANDITS if wanted.bandits else ())):
        method = replace(job.method, controller=controller)
        found = np.array([simulated(job, method, seed) for seed in seeds])
        mean, spread = found.mean(0), found.std(0, ddof=1) if len(seeds) > 1 else found[0] * 0
        print(
            f"| {controller} | {mean[0]:.0f} ± {spread[0]:.0f} | {mean[1]:.2f} | {mean[2]:.1f} |",
            flush=True,
        )


def simulated(job: Job, method: FedSpine, seed: int) -> tuple[float, float, float]:
    """Seconds of a run, the share of them that devices wait, and the mean rank."""
    sizes = {
        "num_hidden_layers": job.layers,
        "intermediate_size": job.channels,
        "hidden_size": job.width,
    }
    layout = layout_of(SimpleNamespace(model_type="bert", num_attention_heads=12, **sizes), "bert")
    kinds = fleet_mix(None, job.devices)
    ids, hardware = device_ids(kinds), Hardware(seed=seed, kinds=tuple(kinds))
    rows = method.steps * method.batch
    frame = Frame(
        extent=Extent(rows * job.tokens, rows * job.tokens**2),
        steps=method.steps,
        scoring=method.importance.order,
        launches=method.steps * job.layers,
        bytes_down=job.head_bytes,
        bytes_up=job.head_bytes,
    )
    state = SimpleNamespace(
        rounds=job.rounds, seed=seed, structures={}, sparsities={}, device_models={}
    )
    rng, units, gain_scale = np.random.default_rng(seed), no_scores(layout), None
    turns = np.concatenate(
        [rng.permutation(job.devices) for _ in range(job.rounds * job.per_round // job.devices + 1)]
    )
    asked, now, waiting, ranks = dict.fromkeys(ids, 0), 0.0, 0.0, []
    for round in range(job.rounds):
        state.round = round

        def exchanges(id: str, sparsity: float, wanted: Any, round: int = round) -> list[Any]:
            """The cost of an exchange at each rank, and what it takes."""
            structure = state.structures.get(id, full(layout))
            costs = forecast(
                layout, structure, frame, sparsity=sparsity, target=method.sparsity, ranks=wanted
            )
            when = {"round": round, "ask": asked[id]}
            return [(cost, hardware.seconds(ids.index(id), **when, **vars(cost))) for cost in costs]

        def foresee(id: str, sparsity: float, wanted: Any) -> list[float]:
            return [timing.total for _, timing in exchanges(id, sparsity, wanted)]

        chosen = [
            ids[i] for i in sorted(turns[round * job.per_round : (round + 1) * job.per_round])
        ]
        turns_now = {
            id: method._turn(state, id, len(method.ranks), n) for n, id in enumerate(chosen)
        }
        plans = method.controller.plan(turns_now, state.device_models, foresee)
        results = {}
        for id, plan in plans.items():
            ((cost, timing),) = exchanges(id, plan.sparsity, [plan.rank])
            gain = (
                0.05 * np.log(plan.rank) / 3 - 0.02 * plan.progress + 0.03 * rng.standard_normal()
            )
            results[id] = PlanResult(
                plan,
                timing.total,
                gain,
                importance=plan.rank**0.5,
                effective_rank=1.0,
                compute_seconds=timing.compute,
                bytes=cost.bytes_down + cost.bytes_up,
            )
            before = state.structures.get(id, full(layout))
            if plan.sparsity > 0:
                votes = (units.heads, units.channels)
                before = shrink(
                    layout, before, votes, sparsity=plan.sparsity, target=method.sparsity
                )
            state.structures[id] = before
            asked[id] += 1
            ranks.append(plan.rank)
        earned, gain_scale = rewards(results, gain_scale)
        state.device_models = method.controller.learn(
            state.device_models, results, earned, method.ranks[-1]
        )
        state.sparsities |= {id: plan.sparsity for id, plan in plans.items()}
        spent = np.array([result.seconds for result in results.values()])
        now, waiting = now + spent.max(), waiting + (spent.max() - spent).mean()
    return now, waiting / now, float(np.mean(ranks))


if __name__ == "__main__":
    main()
