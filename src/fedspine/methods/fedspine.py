"""FedSpine: every device prunes and tunes in turns, at a pruning ratio and a LoRA rank picked for it.

Yao et al. 2025, "Efficient Deployment of Large Language Models on Resource-constrained Devices", arXiv:2501.02438.
A reconstruction: the paper's formulas are not public. What is the paper's and what is ours: docs/methods/fedspine.md.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from typing import Literal, Self

import numpy as np
import torch

from fedspine.control.bandit import Bandit
from fedspine.control.controllers import check_choice, check_ranges, due, plan_round
from fedspine.control.device_model import Pupil, pupil
from fedspine.control.plan import Plan
from fedspine.control.ranks import check_rising
from fedspine.control.reward import Outcome, learn, rewards
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet, Foresight, NoMemory, Profile, Reply
from fedspine.core.message import Tensors, message
from fedspine.core.method import method, usable
from fedspine.core.task import Task
from fedspine.core.tensors import average, half
from fedspine.lm.aggregate import Contribution
from fedspine.lm.base import Model, line_energy
from fedspine.lm.cost import Extent
from fedspine.lm.forecast import Frame, forecast, frame, ranks_that_fit, round_flops
from fedspine.lm.importance import Scores, on_wire, tally
from fedspine.lm.importance_sources import importance_of
from fedspine.lm.importance_tracker import Source
from fedspine.lm.lora import check_rank, fresh
from fedspine.lm.merge import Aggregation, change, merge, share
from fedspine.lm.prunable_layout import Anatomy
from fedspine.lm.structure import Structure, check_target, full, sparsity
from fedspine.lm.tune import LocalTraining, check_tuning, tuning_at
from fedspine.pruning.device import SpineOrder, SpineResult, contribution, deployed
from fedspine.pruning.head_start import Start, check_head_start, started
from fedspine.pruning.semi_async import (
    UnderWay,
    gathered,
    head_today,
    hoped_for,
    late_plan,
    still_late,
)


@message
class SpineState:
    round: int
    rounds: int
    seed: int
    anatomy: Anatomy
    line_energy: Tensors  # squared norms of the base's prunable rows or columns, by site
    embeddings: int  # parameters outside the blocks, for the memory cap
    max_tokens: int
    dense: Tensors  # the change of every site's weight, without the scale
    adapter: Tensors  # its best factors of the largest rank
    head: Tensors
    scores: Scores | None  # the fleet's average importance
    structures: dict[str, Structure]  # of every device that has replied
    reached: dict[str, float]  # the sparsity it was asked for
    bandits: dict[str, Bandit | Pupil]  # more than a bandit where a setting follows times
    gain_scale: float | None  # the usual size of a loss change
    late: dict[str, UnderWay]  # what rounds did not wait for


_RANGES = {
    "sparsity": (0, 0.95),
    "fleet_say": (0, 1),
    "score_every": (1, inf),
    "score_keep": (0, 1),
    "enough": (0.01, 1),
}


@method("fedspine")
@dataclass(frozen=True)
class FedSpine(LocalTraining):
    """LoRA and structured pruning in turns, at a pruning ratio and a rank of each device's own.

    >>> from fedspine import FedSpine, Recipe
    >>> Recipe(method=FedSpine(sparsity=0.4, ranks=(4, 8)), rounds=20).method.ranks
    (4, 8)

    The paper's form is choice "bandit", importance "gradient" and enough 1; the defaults are what was measured to be better.
    """

    sparsity: float = 0.5  # share of the blocks' weights that every device gives up
    ranks: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32)
    scale: float = 2.0  # alpha / rank, the same for all ranks
    head_start: Start = "random"  # what the task head begins as
    most_per_round: float = 0.05  # p_max: sparsity that a device may choose to gain in a round
    warmup: float = 0.05  # t0, as a share of the rounds: nothing is pruned before
    until: float = 0.7  # t1: everything is pruned after
    floor: float = 0.8  # share of the cubic schedule that no device may stay below
    choice: Literal["bandit", "random", "fixed", "oracle", "deadline"] = (
        "deadline"  # of pruning and rank
    )
    fixed_ratio: float = 0.5  # of "fixed": share of most_per_round, 0: as the schedule demands
    fixed_rank: int = 8  # of "fixed"
    patience: float = (
        0.0  # of "oracle" and "deadline": 0 ends the round as soon as can be, 1 hurries nobody
    )
    caution: float = 0.3  # of "deadline": by how much a predicted time may be too short
    explore: float = 0.1  # c of S-UCB
    lipschitz: float = 0.0  # nu of S-UCB: a bonus for coarse leaves
    lipschitz_decay: float = 0.5  # rho: what is left of it in a leaf's child
    pooled: float = (
        0.0  # kappa: plays that a bandit borrows in each leaf from devices as fast; 0 learns alone
    )
    discount: float = 0.95  # lambda: what an old play still counts after a new one
    split_at: float = 2.0  # plays at which a leaf of the bandit's tree is refined
    deepest: int = 2  # of the tree: 16 cells
    reward: Literal["bounded", "ratio"] = "bounded"  # "ratio" is FedMP's
    weights: tuple[float, float, float, float] = (
        1.0,
        1.0,
        1.0,
        1.0,
    )  # of gain, progress, importance, lateness
    importance: Source | Literal["magnitude", "random"] = (
        "blend"  # what a unit's importance is read from
    )
    score_every: int = 1  # steps between two updates of the importance
    score_keep: float = 0.9  # of its moving average
    score_square: bool = False
    score_cross: float = 0.0  # eta
    score_normalise: bool = False
    fleet_say: float = 0.0  # of the fleet's average importance in what a device drops; 0 is the reconstruction's choice
    aggregation: Aggregation = "delta-product"
    enough: float = 0.7  # share of a round's replies that it waits for; the others are merged in the round they come in

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds, in the paper's form."""
        shared = {"steps": 8, "batch": 16, "learning_rate": 2e-2, "warmup": 0.1, "until": 0.6}
        return cls(ranks=(2, 4, 8), choice="bandit", importance="gradient", enough=1.0, **shared)

    def check(self, task: Task) -> None:
        check_ranges(self, _RANGES)
        check_target(task.base.anatomy, self.sparsity)
        check_rising(self.ranks)
        check_rank("method.ranks", self.ranks, task.base.anatomy)
        check_tuning(self)
        check_choice(self)
        check_head_start(self, task)

    def start(self, task: Task, rng: np.random.Generator) -> SpineState:
        anatomy = task.base.anatomy
        return SpineState(
            round=0,
            rounds=task.rounds,
            adapter=fresh(anatomy.sites, self.ranks[-1], rng),
            head=task.base.initial_head(rng),
            seed=int(rng.integers(2**31)),
            anatomy=anatomy,
            line_energy=line_energy(task.base),
            embeddings=task.base.embeddings,
            max_tokens=task.max_tokens,
            dense={site.path: torch.zeros(site.rows, site.columns) for site in anatomy.sites},
            scores=None,
            structures={},
            reached={},
            bandits={},
            gain_scale=None,
            late={},
        )

    def round(self, state: SpineState, fleet: Fleet) -> SpineState:
        if state.round == 0:
            rows = self.steps * self.batch
            state = replace(state, head=started(self, state.head, fleet, rows=rows))
        busy = hoped_for(state.late, state.round)
        plans = self._plans(state, fleet, busy)
        asked = {
            id: UnderWay(order=self._order(state, id, plan), rank=plan.rank)
            for id, plan in plans.items()
        }
        sent = busy | asked
        if not sent:
            raise NoMemory(
                "no device has the memory to train at any rank; lower method.batch, method.ranks or task.max_tokens"
            )
        came = gathered(fleet, sent, asked, self.enough)
        replies = usable(came, fleet)
        parts = {
            r.device: contribution(state.anatomy, sent[r.device].order, r.value) for r in replies
        }
        dense, adapter = merge(
            self.aggregation,
            state.anatomy,
            (state.dense, state.adapter),
            list(parts.values()),
            rank=self.ranks[-1],
            seed=state.seed + state.round,
        )
        plans = {id: late_plan(late) for id, late in busy.items()} | plans
        outcomes = {
            r.device: self._outcome(state, plans[r.device], r, parts[r.device]) for r in replies
        }
        earned, gain_scale = rewards(self, outcomes, state.gain_scale)
        for reply in replies:
            _note(state.anatomy, fleet, reply, outcomes[reply.device], earned.get(reply.device))
        return replace(
            state,
            round=state.round + 1,
            dense=dense,
            adapter=adapter,
            head=average(
                (
                    r.value.examples,
                    head_today(state.head, state.round, sent[r.device].order, r.value),
                )
                for r in replies
            ),
            scores=tally(state.scores, [r.value.scores for r in replies]),
            structures=state.structures | {r.device: r.value.structure for r in replies},
            reached=state.reached | {id: outcome.plan.reached for id, outcome in outcomes.items()},
            bandits=state.bandits | learn(self, state.bandits, outcomes, earned),
            gain_scale=gain_scale,
            late=still_late(sent, came, self.enough),
        )

    def deploy(self, state: SpineState, device: DeviceId | None = None) -> Model:
        """The device's own structure, or for None the one that the fleet's average scores give; the common adapter.

        Whoever is behind the schedule, because it was not asked lately, is pruned to it by the fleet's scores.
        """
        floor = (
            self.sparsity
            if state.round >= state.rounds
            else due(self, state.round - 1, state.rounds)
        )
        return deployed(self, state, device, due=floor, votes=state.scores)

    def planned_sparsity(self, round: int, rounds: int) -> float:
        return due(self, round, rounds)

    def unpruned(self, state: SpineState) -> Model:
        return Model(
            structure=full(state.anatomy), adapter=state.adapter, head=state.head, scale=self.scale
        )

    def _plans(
        self, state: SpineState, fleet: Fleet, busy: Container[DeviceId]
    ) -> dict[DeviceId, Plan]:
        """Every free device's (sparsity, rank) for this round; one whose memory fits no rank is noted and not asked."""
        affordable = {
            profile.id: self._affordable(state, profile)
            for profile in fleet.devices
            if profile.id not in busy
        }
        for device in (device for device, ranks in affordable.items() if not ranks):
            fleet.note(device=device, left_out="no rank fits its memory")
        frame = cache(lambda: self._frame(state))  # of which only the oracle knows
        return plan_round(
            self, state, affordable, lambda *plan: self._foresee(state, fleet, frame(), *plan)
        )

    def _affordable(self, state: SpineState, profile: Profile) -> int:
        """How many of the ranks fit the device's memory while it trains."""
        return ranks_that_fit(
            state.anatomy,
            state.structures.get(profile.id, full(state.anatomy)),
            self.ranks,
            memory_bytes=profile.memory_bytes,
            embeddings=state.embeddings,
            batch=self.batch,
            tokens=state.max_tokens,
            scoring=importance_of(self),
        )

    def _frame(self, state: SpineState) -> Frame:
        order = self._order(state, "", Plan(0.0, self.ranks[0], None, 0.0))
        return frame(
            state.anatomy,
            order,
            order.adapter,
            extent=self._extent(state),
            steps=self.steps,
            scoring=order.scoring,
        )

    def _extent(self, state: SpineState) -> Extent:
        """What a round reads if all texts are of full length."""
        rows = self.steps * self.batch
        return Extent(tokens=rows * state.max_tokens, squared_tokens=rows * state.max_tokens**2)

    def _foresee(
        self,
        state: SpineState,
        fleet: Fleet,
        frame: Frame,
        device: DeviceId,
        reached: float,
        ranks: Sequence[int],
    ) -> list[float]:
        """True seconds of a device's round at each rank, from a fleet that knows them."""
        structure, load = (
            state.structures.get(device, full(state.anatomy)),
            pupil(state.bandits, device).load,
        )
        costs = forecast(
            state.anatomy,
            structure,
            frame,
            reached=reached,
            target=self.sparsity,
            ranks=ranks,
            load=load,
        )
        seconds = [
            fleet.foresee(device, **vars(cost)) if isinstance(fleet, Foresight) else None
            for cost in costs
        ]
        if None in seconds:
            raise BadInput(
                "method.choice is oracle, but only a simulated fleet knows times; choose another"
            )
        return seconds

    def _order(self, state: SpineState, device: DeviceId, plan: Plan) -> SpineOrder:
        structure = state.structures.get(device, full(state.anatomy))
        return SpineOrder(
            round=state.round,
            adapter=half(
                share(self.aggregation, state.anatomy, state.adapter, structure, plan.rank)
            ),
            head=half(state.head),
            structure=structure,
            scores=on_wire(state.scores) if self.fleet_say and state.scores else None,
            fleet_say=self.fleet_say,
            reached=plan.reached,
            target=self.sparsity,
            scale=self.scale,
            tuning=tuning_at(self, state.round, state.rounds),
            scoring=importance_of(self),
        )

    def _outcome(
        self, state: SpineState, plan: Plan, reply: Reply[SpineResult], part: Contribution
    ) -> Outcome:
        """What came of a plan; the size of a change is measured as section 3.3 says."""
        importance, directions = change(state.anatomy, state.line_energy, part, self.scale)
        before, load = reply.value.loss_before, 1.0
        if self.choice == "oracle":
            whole = round_flops(
                state.anatomy,
                reply.value.structure,
                plan.rank,
                self._extent(state),
                self.steps,
                importance_of(self),
            )
            load = reply.cost.flops / whole
        return Outcome(
            plan=plan,
            seconds=reply.cost.seconds,
            gain=None if before is None else before - reply.value.loss,
            importance=importance,
            effective_rank=directions,
            load=load,
        )


def _note(
    anatomy: Anatomy,
    fleet: Fleet,
    reply: Reply[SpineResult],
    outcome: Outcome,
    earned: float | None,
) -> None:
    fleet.note(
        device=reply.device,
        rank=outcome.plan.rank,
        sparsity=sparsity(anatomy, reply.value.structure),
        loss=reply.value.loss,
        reward=earned,
        importance=outcome.importance,
        effective_rank=outcome.effective_rank,
    )
