"""FedSpine: devices alternate pruning and tuning, at a pruning ratio and a LoRA rank chosen for
each.

Yao et al. 2025, "Efficient Deployment of Large Language Models on Resource-constrained Devices",
arXiv:2501.02438. A reconstruction: the paper's formulas are not public. What is the paper's and
what is ours: docs/methods/fedspine.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import numpy as np

from fedspine.control.bandit import rewards
from fedspine.control.controllers import Controller, DeviceModel, SUcb, TextLoad
from fedspine.control.plan import Foresee, Limits, Plan, PlanResult, Turn, cubic_floor
from fedspine.control.ranks import check_rising
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput, check_ranges
from fedspine.core.fleet import Fleet, NoMemory, Profile, Reply
from fedspine.core.merging import merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import LeastWork, method, on_todays, usable
from fedspine.core.parts import quiet
from fedspine.core.task import Task
from fedspine.core.tensors import half
from fedspine.lm.aggregate import Contribution, bounded
from fedspine.lm.base import Model
from fedspine.lm.cost import Extent
from fedspine.lm.distillation import NoTeacher, Teacher
from fedspine.lm.forecast import Frame, forecast, frame, least_rank, ranks_that_fit, round_flops
from fedspine.lm.importance import Scores, tally
from fedspine.lm.importance_sources import Gradient, Importance
from fedspine.lm.lora import adapter_rank, check_rank, fresh
from fedspine.lm.merge import RankMerging, change, line_energy, merge, no_change, share
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, StructureKind, check_target, full, sparsity
from fedspine.lm.tuning import TOY, LocalTraining, check_tuning, tuning_at
from fedspine.pruning.device import (
    SpineOrder,
    SpineResult,
    completed,
    contribution,
    deployed,
    prune_and_tune,
)


@message
class SpineState:
    round: int
    rounds: int
    seed: int
    layout: PrunableLayout
    line_energy: Tensors  # squared norms of the base's prunable rows or columns, by site
    embeddings: int  # parameters outside the blocks, for the memory cap
    max_tokens: int
    dense: Tensors  # the change of every site's weight, without the scale
    adapter: Tensors  # its best factors of the largest rank
    head: Tensors
    scores: Scores | None  # the fleet's average importance
    structures: dict[str, Structure]  # of every device that has replied
    sparsities: dict[str, float]  # the sparsity it was asked for
    device_models: dict[str, DeviceModel]  # what the controller knows of devices
    gain_scale: float | None  # the usual size of a loss change


@method("fedspine", merges_late=prune_and_tune, robust=True, server_optimiser=True)
@dataclass(frozen=True)
class FedSpine(LocalTraining):
    """Alternating LoRA and structured pruning, with a pruning ratio and a rank for each device, in
    the paper's form.

    >>> from fedspine import FedSpine, Recipe
    >>> Recipe(method=FedSpine(sparsity=0.4, ranks=(4, 8)), rounds=20).method.ranks
    (4, 8)
    """

    sparsity: float = 0.5  # share of the blocks' weights that every device drops
    ranks: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32)
    scale: float = 2.0  # alpha / rank, the same for all ranks
    controller: Controller = SUcb()  # what chooses pruning and rank
    importance: Importance = Gradient()  # where a unit's importance comes from
    most_per_round: float = 0.05  # p_max: sparsity that a device may choose to gain in a round
    warmup: float = 0.05  # t0, as a share of the rounds: nothing is pruned before
    until: float = 0.7  # t1: everything is pruned after
    floor: float = 0.8  # share of the cubic schedule that no device may stay below
    aggregation: RankMerging = "delta-product"
    teacher: Teacher = quiet(NoTeacher())  # teacher of a pruned model, in addition to the labels
    structure: StructureKind = quiet("free")  # whether layers may keep different numbers of units

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, ranks=(2, 4, 8), warmup=0.1, until=0.6)

    def check(self, task: Task) -> None:
        check_ranges(self, {"sparsity": (0, 0.95), "most_per_round": (1e-3, 1)})
        check_target(task.base.layout, self.sparsity, self.structure)
        check_rising(self.ranks)
        check_rank("method.ranks", self.ranks, task.base.layout)
        check_tuning(self)
        self.teacher.check(task)
        self._due(0, 1)
        self.controller.check(self.ranks)
        self.importance.check()

    def least_work(self, task: Task) -> LeastWork:
        return least_rank(task, self.ranks[0], batch=self.batch, scoring=self.importance.order)

    def start(self, task: Task, rng: np.random.Generator) -> SpineState:
        layout = task.base.layout
        return SpineState(
            round=0,
            rounds=task.rounds,
            adapter=fresh(layout.sites, self.ranks[-1], rng),
            head=task.base.initial_head(rng),
            seed=int(rng.integers(2**31)),
            layout=layout,
            line_energy=line_energy(task.base),
            embeddings=task.base.embeddings,
            max_tokens=task.max_tokens,
            dense=no_change(self.aggregation, layout),
            scores=None,
            structures={},
            sparsities={},
            device_models={},
            gain_scale=None,
        )

    def round(self, state: SpineState, fleet: Fleet) -> SpineState:
        plans = self._plans(state, fleet)
        orders = {id: self._order(state, id, plan) for id, plan in plans.items()}
        came = fleet.ask(prune_and_tune, orders)
        if not (orders or came):
            raise NoMemory(
                "no device has the memory to train at any rank; lower method.batch, method.ranks "
                "or task.max_tokens"
            )
        replies = on_todays(usable(came, fleet), head=state.head)
        return self._state_after(state, fleet, plans, replies)

    def deploy(self, state: SpineState, device: DeviceId | None = None) -> Model:
        """The device's own structure with the common adapter; for None the global model, pruned by
        the fleet's average scores.

        A device that was not asked recently may be behind the schedule, and is pruned to it by
        the fleet's scores.
        """
        done = state.round >= state.rounds
        floor = self.sparsity if done else self._due(state.round - 1, state.rounds)
        return deployed(self, state, device, due=floor, votes=state.scores)

    def unpruned(self, state: SpineState) -> Model:
        return Model(
            structure=full(state.layout), adapter=state.adapter, head=state.head, scale=self.scale
        )

    def planned_sparsity(self, round: int, rounds: int) -> float:
        return self._due(round, rounds)

    def _due(self, round: int, rounds: int) -> float:
        """The sparsity below which no device may stay in a round, counted from 0; 0 before the
        first.
        """
        if round < 0:
            return 0.0
        return cubic_floor(
            round,
            rounds,
            self.sparsity,
            warmup=self.warmup,
            until=self.until,
            share=self.floor,
        )

    # --- plans ---

    def _plans(self, state: SpineState, fleet: Fleet) -> dict[DeviceId, Plan]:
        """Every device's (sparsity, rank) for this round; one whose memory fits no rank is noted
        and not asked.
        """
        turns = {}
        for number, profile in enumerate(fleet.devices):
            if ranks := self._affordable_ranks(state, profile):
                turns[profile.id] = self._turn(state, profile.id, ranks, number)
            else:
                fleet.note(device=profile.id, left_out="no rank fits its memory")
        return self.controller.plan(turns, state.device_models, self._foresee(state, fleet))

    def _affordable_ranks(self, state: SpineState, profile: Profile) -> int:
        """How many of the ranks fit the device's memory while it trains."""
        return ranks_that_fit(
            state.layout,
            state.structures.get(profile.id, full(state.layout)),
            self.ranks,
            memory_bytes=profile.memory_bytes,
            embeddings=state.embeddings,
            batch=self.batch,
            tokens=state.max_tokens,
            scoring=self.importance.order,
        )

    def _turn(self, state: SpineState, device: DeviceId, affordable: int, number: int) -> Turn:
        limits = Limits(
            sparsity=state.sparsities.get(device, 0.0),
            due=self._due(state.round, state.rounds),
            target=self.sparsity,
            most_per_round=self.most_per_round,
            ranks=self.ranks,
            affordable=affordable,
        )
        early = state.round < self.warmup * state.rounds
        return Turn(
            limits,
            warm=early or not self._knows_units(state, device),
            rng=np.random.default_rng([state.seed, state.round, number]),
        )

    def _knows_units(self, state: SpineState, device: DeviceId) -> bool:
        """Whether the importance of the device's units is known, so that it can prune."""
        return device in state.structures

    def _foresee(self, state: SpineState, fleet: Fleet) -> Foresee:
        """True seconds of a device's round, for the oracle among the controllers."""
        common = cache(lambda: self._frame(state))

        def foresee(device: DeviceId, sparsity: float, ranks: Sequence[int]) -> list[float]:
            costs = forecast(
                state.layout,
                state.structures.get(device, full(state.layout)),
                common(),
                sparsity=sparsity,
                target=self.sparsity,
                ranks=ranks,
                load=state.device_models.get(device, TextLoad(load=1.0)).load,
                kind=self.structure,
            )
            seconds = [fleet.foresee(device, **vars(cost)) for cost in costs]
            if None in seconds:
                raise BadInput(
                    "method.controller is oracle, but only a simulated fleet knows times; "
                    "choose another"
                )
            return seconds

        return foresee

    def _frame(self, state: SpineState) -> Frame:
        order = self._order(state, "", Plan(0.0, self.ranks[0], None, 0.0))
        return frame(
            state.layout,
            order,
            order.adapter,
            extent=self._extent(state),
            steps=self.steps,
            scoring=order.scoring,
            taught=self.teacher.order is not None,
        )

    def _extent(self, state: SpineState) -> Extent:
        """The tokens of a round if all texts have full length."""
        rows = self.steps * self.batch
        return Extent(tokens=rows * state.max_tokens, squared_tokens=rows * state.max_tokens**2)

    def _order(self, state: SpineState, device: DeviceId, plan: Plan) -> SpineOrder:
        structure = state.structures.get(device, full(state.layout))
        order = SpineOrder(
            round=state.round,
            adapter=half(
                share(self.aggregation, state.layout, state.adapter, structure, plan.rank)
            ),
            head=half(state.head),
            structure=structure,
            scores=None,
            global_importance_weight=0.0,
            sparsity=plan.sparsity,
            target=self.sparsity,
            scale=self.scale,
            tuning=tuning_at(self, state.round, state.rounds),
            scoring=self.importance.order,
        )
        return completed(order, self.teacher, self.structure)

    # --- what came of them ---

    def _state_after(
        self,
        state: SpineState,
        fleet: Fleet,
        plans: dict[DeviceId, Plan],
        replies: Sequence[Reply[SpineResult]],
    ) -> SpineState:
        """The state after these replies, at the end of a round."""
        changed = [contribution(state.layout, reply) for reply in replies]
        counted = bounded(fleet, state.layout, replies, changed)
        parts = {reply.device: part for reply, part in zip(replies, counted, strict=True)}
        dense, adapter = merge(
            self.aggregation,
            state.layout,
            (state.dense, state.adapter),
            list(parts.values()),
            rank=self.ranks[-1],
            seed=state.seed + state.round,
            aggregation=fleet.aggregation,
            server=fleet.server,
        )
        results = {
            reply.device: self._plan_result(
                state,
                _late_plan(reply.order) if reply.late else plans[reply.device],
                reply,
                parts[reply.device],
            )
            for reply in replies
        }
        earned, gain_scale = rewards(results, state.gain_scale)
        for reply in replies:
            _note_reply(state.layout, fleet, reply, results[reply.device], earned.get(reply.device))
        return replace(
            state,
            round=state.round + 1,
            dense=dense,
            adapter=adapter,
            **merged(replies, fleet, head=state.head),
            scores=tally(
                state.scores, [reply.value.scores for reply in replies], fleet.aggregation
            ),
            structures=state.structures | {r.device: r.value.structure for r in replies},
            sparsities=state.sparsities
            | {id: result.plan.sparsity for id, result in results.items()},
            device_models=self.controller.learn(
                state.device_models, results, earned, self.ranks[-1]
            ),
            gain_scale=gain_scale,
        )

    def _plan_result(
        self, state: SpineState, plan: Plan, reply: Reply[SpineResult], part: Contribution
    ) -> PlanResult:
        """The result of a plan; the size of a change is measured as in section 3.3."""
        part = replace(part, back={**part.sent, **part.back})  # what was not trained did not change
        importance, directions = change(state.layout, state.line_energy, part, self.scale)
        before = reply.value.loss_before
        full_length = round_flops(
            state.layout,
            reply.value.structure,
            plan.rank,
            self._extent(state),
            self.steps,
            self.importance.order,
            taught=self.teacher.order is not None,
        )
        return PlanResult(
            plan=plan,
            seconds=reply.cost.seconds,
            compute_seconds=reply.cost.compute_seconds,
            bytes=reply.cost.bytes_down + reply.cost.bytes_up,
            gain=None if before is None else before - reply.value.loss,
            importance=importance,
            effective_rank=directions,
            load=reply.cost.flops / full_length,
        )


def _late_plan(order: SpineOrder) -> Plan:
    """The plan of a late reply, for which no bandit is credited."""
    return Plan(order.sparsity, adapter_rank(order.adapter), action=None, progress=0.0)


def _note_reply(
    layout: PrunableLayout,
    fleet: Fleet,
    reply: Reply[SpineResult],
    result: PlanResult,
    earned: float | None,
) -> None:
    fleet.note(
        device=reply.device,
        rank=result.plan.rank,
        sparsity=sparsity(layout, reply.value.structure),
        loss=reply.value.loss,
        reward=earned,
        importance=result.importance,
        effective_rank=result.effective_rank,
    )
