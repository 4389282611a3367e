"""FedAdapter: adapters start shallow and narrow; in trials, groups of devices try a deeper and a
wider one, and training continues with the best of the three branches.

Cai et al. 2023, "Efficient Federated Learning for Modern NLP", MobiCom, arXiv:2205.10162. What is
the paper's and what is ours: docs/methods/fedadapter.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from fedspine.core.checks import Asked, need, within
from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet, Reply
from fedspine.core.merging import Weighted, combined, merged
from fedspine.core.message import Tensors, message
from fedspine.core.method import LeastWork, method, on_todays, usable
from fedspine.core.reads import Reads
from fedspine.core.task import Task
from fedspine.core.tensors import half, single
from fedspine.lm.base import Base, Model
from fedspine.lm.cost import HALF, Extent, forward_flops, training_memory_bytes
from fedspine.lm.forecast import USABLE_MEMORY, least_work, leave_out, no_block_fits
from fedspine.lm.lora import a_name, adapter_rank, b_name, check_rank, fresh_a
from fedspine.lm.prefix import BATCH
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.received import check_adapter, check_head
from fedspine.lm.score import score
from fedspine.lm.structure import full
from fedspine.lm.tuning import TOY, LocalTraining, check_tuning, tuning_at
from fedspine.methods.fedlora import LoraOrder, LoraResult, tune_adapter

PRESENT, WIDER, DEEPER = "present", "wider", "deeper"
BRANCHES = (PRESENT, WIDER, DEEPER)  # the first wins a tie
GROUPS, GROWTH = 403, 404  # the purposes of two random streams


@message
class BranchOrder(LoraOrder):
    trial: int  # which of the run's trials
    branch: str

    def check(self, asked: Asked) -> None:
        super().check(asked)
        need(self.branch in BRANCHES and self.trial >= 0, "no branch of a trial")


@message
class TrialOrder:
    adapters: dict[str, Tensors]  # fp16, by branch
    heads: dict[str, Tensors]  # fp16, by branch
    scale: float
    rows: int  # to score each branch on

    @property
    def reads(self) -> Reads:
        return Reads(batch=self.rows, scale=self.scale)

    def check(self, asked: Asked) -> None:
        same = self.adapters.keys() == self.heads.keys()
        need(same and set(self.adapters) <= set(BRANCHES), "branches are of another kind")
        need(self.rows >= 1, f"rows is {self.rows}, but at least 1 is needed")
        for branch, adapter in self.adapters.items():
            check_adapter(adapter, asked.base.layout)
            check_head(self.heads[branch], asked)


@message
class TrialResult:
    accuracies: dict[str, float]  # 0 to 1, by branch
    examples: int

    def check(self, asked: Asked) -> None:
        asked.examples(self.examples)
        known = BRANCHES if asked.order is None else asked.order.adapters
        need(set(self.accuracies) == set(known), "accuracies are of other branches")
        for accuracy in self.accuracies.values():
            within("accuracy", accuracy, 0, 1)


@on_device
def score_branches(device: Device, order: TrialOrder) -> TrialResult:
    """The accuracy of each branch on some of the device's rows, the same rows for all branches."""
    base: Base = device.base
    chosen = device.rng.permutation(len(device.data))[: order.rows]
    device.uses(chosen)
    data, accuracies, tokens, squared = device.data.take(chosen), {}, 0, 0
    # the same model in all branches reveals no more than in one
    one_row = len(order.adapters) ** 0.5 / max(1, device.rows_used)
    for branch, adapter in order.adapters.items():
        model = Model(
            structure=full(base.layout),
            adapter=single(adapter),
            head=single(order.heads[branch]),
            scale=order.scale,
        )
        found = score(base, model, data)
        accuracy = device.mean_beside(found.correct / max(1, found.count), one_row)
        accuracies[branch] = min(1.0, accuracy)
        for rows in data.batches_by_length(BATCH):
            tokens += len(rows) * data.width(rows)
            squared += len(rows) * data.width(rows) ** 2
    device.spend(  # adapters are merged, so each branch takes a plain pass
        flops=forward_flops(base.layout, Extent(tokens=tokens, squared_tokens=squared)),
        memory_bytes=HALF * (base.embeddings + base.layout.parameters),
    )
    return TrialResult(accuracies=accuracies, examples=len(device.data))


@message
class Branch:
    """One configuration in a trial: `depth` blocks at the output with adapters of rank `width`."""

    depth: int
    width: int
    adapter: Tensors
    head: Tensors
    exchanges: int  # in this trial so far
    seconds: float  # that they took

    def has_time(self, other: "Branch", exchanges: int) -> bool:
        """Whether one more exchange ends no later than `exchanges` exchanges of `other`."""
        if not (self.exchanges and other.exchanges):
            return True
        window = exchanges * other.seconds / other.exchanges
        return self.seconds * (1 + 1 / self.exchanges) <= window


@message
class FedAdapterState:
    round: int
    rounds: int
    turns: float  # of a device in the whole run, on average
    seed: int
    layout: PrunableLayout
    embeddings: int  # parameters outside the blocks, for the memory bound
    max_tokens: int
    trial: int
    branches: dict[str, Branch]


@method("fedadapter", merges_late=tune_adapter, robust=True, groups=len(BRANCHES))
@dataclass(frozen=True)
class FedAdapter(LocalTraining):
    """LoRA whose depth and rank grow as long as trials show a gain.

    >>> from fedspine import Recipe
    >>> Recipe(method=FedAdapter(depth=2), rounds=5).method.width
    8
    """

    depth: int = 1  # blocks with an adapter at the start, counted from the output
    width: int = 8  # rank at the start
    width_step: int = 8  # additional rank of the wider branch
    largest_width: int = 32
    trial_rounds: int = 5  # exchanges of the present configuration in a trial
    trial_rows: int = 128  # rows of each device on which branches are compared
    scale: float = 2.0  # of every adapter

    @classmethod
    def toy(cls) -> Self:
        """Settings with which a tiny model learns a toy task in a few rounds."""
        return cls(**TOY, width=4, width_step=2, largest_width=8, trial_rounds=2, trial_rows=32)

    def check(self, task: Task) -> None:
        layers = task.base.layout.layers
        if not 0 <= self.depth <= layers:
            raise BadInput(
                f"method.depth is {self.depth}, but 0 to {layers} blocks of this model can be "
                "adapted; 0 means the head alone"
            )
        check_rank("method.width", (self.width,), task.base.layout)
        check_rank("method.largest_width", (self.largest_width,), task.base.layout)
        if self.largest_width < self.width:
            raise BadInput(
                f"method.largest_width is {self.largest_width}, below method.width = {self.width}"
            )
        for name in ("width_step", "trial_rounds", "trial_rows"):
            if getattr(self, name) < 1:
                raise BadInput(f"method.{name} is {getattr(self, name)}, but at least 1 is needed")
        check_tuning(self)

    def predicted_reads(self, base: Any) -> Reads:
        """With the rank to which adapters may grow."""
        return replace(super().predicted_reads(base), rank=self.largest_width)

    def least_work(self, task: Task) -> LeastWork:
        """The first configuration; no branch is smaller."""
        sizes = (task.base.layout, task.base.embeddings, task.max_tokens)
        return least_work(self._training_bytes(*sizes, self.depth, self.width), "method.width")

    def start(self, task: Task, rng: np.random.Generator) -> FedAdapterState:
        state = FedAdapterState(
            round=0,
            rounds=task.rounds,
            turns=task.turns,
            layout=task.base.layout,
            embeddings=task.base.embeddings,
            max_tokens=task.max_tokens,
            seed=int(rng.integers(2**31)),
            trial=0,
            branches={},
        )
        head = task.base.initial_head(rng)
        first = Branch(
            depth=self.depth, width=self.width, adapter={}, head=head, exchanges=0, seconds=0.0
        )
        return replace(state, branches=self._next_branches(state, first))

    def round(self, state: FedAdapterState, fleet: Fleet) -> FedAdapterState:
        orders = self._orders(state, fleet)
        came = fleet.ask(tune_adapter, orders)
        if not (orders or came):
            raise no_block_fits("method.width")
        branches = dict(state.branches)
        replies = self._replies_by_branch(state, fleet, usable(came, fleet))
        for name, of_branch in replies.items():
            branches[name] = _merged_branch(fleet, branches[name], of_branch)
        state = replace(state, round=state.round + 1, branches=branches)
        done = branches[PRESENT].exchanges >= self.trial_rounds
        return self._next_trial(state, fleet) if done else state

    def deploy(self, state: FedAdapterState, device: DeviceId | None = None) -> Model:
        """The base with the adapter of the present configuration, the same for all devices."""
        best = state.branches[PRESENT]
        return Model(
            structure=full(state.layout), adapter=best.adapter, head=best.head, scale=self.scale
        )

    def unpruned(self, state: FedAdapterState) -> Model:
        return self.deploy(state)

    # --- one round of a trial ---

    def _orders(self, state: FedAdapterState, fleet: Fleet) -> dict[DeviceId, BranchOrder]:
        """A new random assignment of devices to the branches that have time left; a device without
        the memory for its branch goes to another one.
        """
        present = state.branches[PRESENT]
        names = [
            name
            for name, branch in state.branches.items()
            if name == PRESENT or branch.has_time(present, self.trial_rounds)
        ]
        sizes, tried = (state.layout, state.embeddings, state.max_tokens), state.branches
        needed = {
            name: self._training_bytes(*sizes, tried[name].depth, tried[name].width)
            for name in names
        }
        tuning = tuning_at(self, state.round, state.rounds, state.turns)
        made = {
            name: BranchOrder(
                adapter=half(state.branches[name].adapter),
                head=half(state.branches[name].head),
                scale=self.scale,
                tuning=tuning,
                trial=state.trial,
                branch=name,
            )
            for name in names
        }
        rng = np.random.default_rng([state.seed, GROUPS, state.round])
        places = (state.round + rng.permutation(len(fleet.devices))) % len(names)
        orders = {}
        for profile, place in zip(fleet.devices, places, strict=True):
            room = USABLE_MEMORY * profile.memory_bytes
            wanted = [*names[place:], *names[:place]]
            if fitting := [name for name in wanted if needed[name] <= room]:
                orders[profile.id] = made[fitting[0]]
            else:
                leave_out(fleet, profile.id)
        return orders

    def _training_bytes(
        self, layout: PrunableLayout, embeddings: int, tokens: int, depth: int, width: int
    ) -> int:
        return training_memory_bytes(
            layout,
            full(layout),
            rank=width,
            embeddings=embeddings,
            batch=self.batch,
            tokens=tokens,
            first=layout.layers - depth,
        )

    def _replies_by_branch(
        self, state: FedAdapterState, fleet: Fleet, replies: Sequence[Reply[LoraResult]]
    ) -> dict[str, list[Reply[LoraResult]]]:
        """The replies of this trial, by branch; those of an earlier trial are dropped."""
        found: dict[str, list[Reply[LoraResult]]] = {}
        for reply in replies:
            name = reply.order.branch
            if reply.order.trial != state.trial:
                fleet.note(device=reply.device, left_out="its trial is over")
                continue
            branch = state.branches[name]
            fleet.note(
                device=reply.device,
                branch=name,
                depth=branch.depth,
                rank=branch.width,
                sparsity=0.0,
                loss=reply.value.loss,
            )
            found.setdefault(name, []).append(reply)
        return found

    # --- the end of a trial ---

    def _next_trial(self, state: FedAdapterState, fleet: Fleet) -> FedAdapterState:
        """The next trial, which starts from the branch with the highest accuracy."""
        tried = {name: each for name, each in state.branches.items() if each.exchanges}
        winner = self._best_branch(fleet, tried) if len(tried) > 1 else PRESENT
        best = replace(state.branches[winner], exchanges=0, seconds=0.0)
        state = replace(state, trial=state.trial + 1)
        return replace(state, branches=self._next_branches(state, best))

    def _best_branch(self, fleet: Fleet, tried: Mapping[str, Branch]) -> str:
        """The branch with the highest accuracy on the rows of all devices that reply, merged by
        `fleet.aggregation`.
        """
        order = TrialOrder(
            adapters={name: half(branch.adapter) for name, branch in tried.items()},
            heads={name: half(branch.head) for name, branch in tried.items()},
            scale=self.scale,
            rows=self.trial_rows,
        )
        replies = fleet.ask(score_branches, {device.id: order for device in fleet.devices})
        if not replies:
            return PRESENT
        found = [
            Weighted(
                reply.device,
                reply.weight,
                {name: torch.tensor(reply.value.accuracies[name]) for name in tried},
            )
            for reply in usable(replies, fleet)
        ]
        nothing = {name: torch.tensor(0.0) for name in tried}
        merged_accuracies = combined(fleet, "accuracies", found, nothing)
        means = {name: float(accuracy) for name, accuracy in merged_accuracies.items()}
        winner = max(means, key=means.__getitem__)  # the first wins a tie
        fleet.note(trial=means, winner=winner, depth=tried[winner].depth, rank=tried[winner].width)
        return winner

    def _next_branches(self, state: FedAdapterState, best: Branch) -> dict[str, Branch]:
        """The next branches, from the weights of `best`; without those beyond a limit."""
        # without an adapter, the deeper branch skips depth 1, as in the released code
        deeper = min(state.layout.layers, best.depth + 1 if best.depth else 2)
        wider = min(self.largest_width, best.width + self.width_step)
        sizes = {
            PRESENT: (best.depth, best.width),
            WIDER: (best.depth, wider if best.depth else best.width),
            DEEPER: (deeper, best.width),
        }
        found: dict[str, Branch] = {}
        for place, (name, (depth, width)) in enumerate(sizes.items()):
            if name == PRESENT or (depth, width) != sizes[PRESENT]:
                rng = np.random.default_rng([state.seed, GROWTH, state.trial, place])
                adapter = grown(state.layout, best.adapter, depth, width, rng)
                found[name] = replace(best, depth=depth, width=width, adapter=adapter)
        return found


def _merged_branch(fleet: Fleet, branch: Branch, replies: list[Reply[LoraResult]]) -> Branch:
    """The branch after a round: FedAvg of A and B over its devices."""
    replies = on_todays(replies, adapter=branch.adapter, head=branch.head)
    in_time = [reply.cost.seconds for reply in replies if not reply.late]
    return replace(
        branch,
        **merged(replies, fleet, adapter=branch.adapter, head=branch.head),
        exchanges=branch.exchanges + bool(in_time),
        seconds=branch.seconds + max(in_time, default=0.0),
    )


def grown(
    layout: PrunableLayout, adapter: Tensors, depth: int, width: int, rng: np.random.Generator
) -> Tensors:
    """The adapter extended to rank `width` on the upper `depth` blocks: new parts of A are random
    and of B zero, so that the model's output does not change.
    """
    found: Tensors = {}
    for site in layout.sites:
        if site.layer < layout.layers - depth:
            continue
        a, b = a_name(site.path), b_name(site.path)
        old = {name: adapter[name] for name in (a, b) if name in adapter}
        missing = width - adapter_rank(old)
        more_a, more_b = fresh_a(rng, missing, site.columns), torch.zeros(site.rows, missing)
        found[a] = torch.cat([old[a], more_a]) if old else more_a
        found[b] = torch.cat([old[b], more_b], 1) if old else more_b
    return found
