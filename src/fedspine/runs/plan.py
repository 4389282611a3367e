"""The cost of a recipe before anything is loaded or trained: memory, seconds and bytes by kind of
device.

The method runs its first round on a fleet that is charged like the simulated one but trains nothing
(`fleets.planned`), on a base without weights (`lm.weightless`).
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from fedspine.core.errors import unknown
from fedspine.core.task import Task
from fedspine.fleets.hardware import KINDS, fleet_mix
from fedspine.fleets.planned import PlannedFleet, Quote
from fedspine.lm.cost import training_memory_bytes
from fedspine.lm.forecast import USABLE_MEMORY, depth_bytes
from fedspine.lm.structure import full
from fedspine.runs.assemble import cohort
from fedspine.runs.config import Recipe
from fedspine.runs.planned_round import Rounds, check_able, classes_of, rounds_of, trainings
from fedspine.runs.read_data import modelled

MOST_BATCH = 1 << 16  # the largest batch that is tried

Range = tuple[float, float]  # the least and the most


@dataclass(frozen=True)
class Seconds:
    """The times of one exchange with a kind's devices, without random jitter, as ranges."""

    computing: Range
    down: Range
    up: Range
    total: Range


@dataclass(frozen=True)
class TrainingCost:
    """What a kind's devices would be asked to train in a round, as ranges over those in the planned
    cohorts.
    """

    rank: Range
    depth: Range  # from the lowest trained block to the output
    blocks: Range  # trained blocks
    sparsity: float
    peak_memory_bytes: int
    fits: bool
    flops: Range
    bytes_down: Range
    bytes_up: Range
    seconds: Seconds


@dataclass(frozen=True)
class Largest:
    """The largest values that fit a kind's memory, all else as in the recipe; 0: none does."""

    depth: int
    rank: int  # on all blocks
    batch: int  # on all blocks


@dataclass(frozen=True)
class KindCost:
    """The plan of one kind of device."""

    kind: str
    devices: int
    memory_bytes: int
    usable_bytes: int
    dense_memory_bytes: int  # to train an adapter on all blocks of the unpruned model
    dense_fits: bool
    largest: Largest
    training: TrainingCost | None  # None if nothing fits
    pruned: TrainingCost | None  # at the target sparsity; None unless the method prunes
    left_out: str | None  # why no device of this kind is asked


@dataclass(frozen=True)
class Charged:
    """One exchange of the first round, as it would be recorded, without losses."""

    device: str
    kind: str
    work: str
    bytes_down: int
    bytes_up: int
    flops: float
    peak_memory_bytes: int
    seconds: float
    compute_seconds: float


@dataclass(frozen=True)
class RoundCost:
    """The first round, with the draws of the simulated clock."""

    devices: int
    seconds: float
    bytes_down: int
    bytes_up: int
    exchanges: tuple[Charged, ...]


@dataclass(frozen=True)
class RunCost:
    """The whole run; None if the costs of rounds differ."""

    rounds: int
    seconds: float | None
    bytes_down: int | None
    bytes_up: int | None


@dataclass(frozen=True)
class CostPlan:
    """The cost of a recipe; `remarks` state the assumptions."""

    method: str
    model: str
    architecture: str
    parameters: int
    block_parameters: int  # of the blocks' linear layers, to which sparsity refers
    layers: int
    rank: int  # the method's largest
    batch: int
    tokens: int
    steps: int
    kinds: tuple[KindCost, ...]
    round: RoundCost
    run: RunCost
    remarks: tuple[str, ...]


def plan(recipe: Recipe, *, classes: int | None = None, kind: str | None = None) -> CostPlan:
    """The plan of a recipe; `classes` is the task's number of classes, and `kind` gives all devices
    one kind.

    Raises BadInput for a recipe that a run would refuse before it begins, and for one that cannot
    be planned.
    """
    if kind is not None:
        recipe = _of_kind(recipe, kind)
    recipe, line = modelled(recipe)
    check_able(recipe)
    kinds = fleet_mix(recipe.fleet.mix, recipe.fleet.devices)
    known, doubt = classes_of(recipe, classes)
    rounds = rounds_of(recipe, kinds, known)
    base, method = rounds.task.base, recipe.method
    return CostPlan(
        method=method.name,
        model=recipe.task.model,
        architecture=base.layout.architecture,
        parameters=base.embeddings + base.layout.parameters,
        block_parameters=base.layout.parameters,
        layers=base.layout.layers,
        rank=_rank(method),
        batch=method.batch,
        tokens=rounds.task.max_tokens,
        steps=method.steps,
        kinds=tuple(_kind(recipe, rounds, name, kinds) for name in dict.fromkeys(kinds)),
        round=_round_plan(rounds.first, kinds),
        run=_run(recipe, rounds.first),
        remarks=tuple(filter(None, (line, doubt, *_remarks(recipe, rounds)))),
    )


def _of_kind(recipe: Recipe, kind: str) -> Recipe:
    if kind not in KINDS:
        raise unknown("device kind", kind, KINDS)
    return recipe.choosing({"fleet": {"mix": {kind: recipe.fleet.devices}}})


# --- totals


def _round_plan(fleet: PlannedFleet, kinds: list[str]) -> RoundCost:
    of = dict(zip(fleet.ids, kinds, strict=True))
    return RoundCost(
        devices=len(trainings(fleet)),
        seconds=fleet.now,
        bytes_down=sum(one.quote.bytes_down for one in fleet.exchanges),
        bytes_up=sum(one.quote.bytes_up for one in fleet.exchanges),
        exchanges=tuple(
            Charged(
                device=one.device,
                kind=of[one.device],
                work=one.work.__name__,
                **vars(one.cost),
            )
            for one in fleet.exchanges
        ),
    )


def _run(recipe: Recipe, first: PlannedFleet) -> RunCost:
    """The totals over all rounds, if every device trains the same whenever it is asked and rounds
    wait for every reply.
    """
    rounds, section, asked = recipe.run.rounds, recipe.fleet, trainings(first)
    waits = section.quorum == 1 and not (section.drop or section.delay_seconds)
    if not (asked and recipe.method.same_shapes and waits) or recipe.run.seconds:
        return RunCost(rounds, None, None, None)
    same = next(iter(asked.values())).quote
    asks = Counter(one.device for one in first.exchanges)
    seconds = first.now
    for round in range(1, rounds):
        part = [first.ids[i] for i in cohort(recipe, round)]
        seconds += max(first.timing(id, same, round=round, ask=asks[id]).total for id in part)
        asks.update(part)
    quotes = [one.quote for one in first.exchanges]
    later = asks.total() - len(quotes)
    return RunCost(
        rounds,
        seconds,
        sum(quote.bytes_down for quote in quotes) + later * same.bytes_down,
        sum(quote.bytes_up for quote in quotes) + later * same.bytes_up,
    )


# --- kinds


def _kind(recipe: Recipe, rounds: Rounds, name: str, kinds: list[str]) -> KindCost:
    task, memory, first = rounds.task, KINDS[name].memory_bytes, rounds.first
    mine = {id for id, kind in zip(first.ids, kinds, strict=True) if kind == name}
    dense = _memory(task, _rank(recipe.method), recipe.method.batch)
    out = [why for fleet in rounds.plans for id, why in fleet.left_out.items() if id in mine]
    room = USABLE_MEMORY * memory
    asked = {one.quote for id, one in rounds.trainings.items() if id in mine}
    later = {quote for id, quote in rounds.pruned.items() if id in mine}
    return KindCost(
        kind=name,
        devices=len(mine),
        memory_bytes=memory,
        usable_bytes=int(room),
        dense_memory_bytes=dense,
        dense_fits=dense <= room,
        largest=_largest(recipe, task, room),
        training=_summed(first, mine, asked, room),
        pruned=_summed(first, mine, later, room),
        left_out=out[0] if out else None,
    )


def _summed(
    fleet: PlannedFleet, devices: Collection[str], quotes: Collection[Quote], room: float
) -> TrainingCost | None:
    """The ranges of these orders' costs; each device of the kind may get any of them."""
    if not quotes:
        return None
    trained = [quote.price.trained for quote in quotes if quote.price.trained is not None]
    times = [
        fleet.timing(id, quote, round=0, ask=None) for id in sorted(devices) for quote in quotes
    ]
    peak = max(quote.price.peak_memory_bytes for quote in quotes)
    return TrainingCost(
        rank=_range(one.rank for one in trained),
        depth=_range(one.depth for one in trained),
        blocks=_range(one.blocks for one in trained),
        sparsity=max(one.sparsity for one in trained),
        peak_memory_bytes=peak,
        fits=peak <= room,
        flops=_range(quote.price.flops for quote in quotes),
        bytes_down=_range(quote.bytes_down for quote in quotes),
        bytes_up=_range(quote.bytes_up for quote in quotes),
        seconds=Seconds(
            computing=_range(time.compute for time in times),
            down=_range(time.down for time in times),
            up=_range(time.up for time in times),
            total=_range(time.total for time in times),
        ),
    )


def _largest(recipe: Recipe, task: Task, room: float) -> Largest:
    layout, rank, batch = task.base.layout, _rank(recipe.method), recipe.method.batch
    shapes = {"embeddings": task.base.embeddings, "batch": batch, "tokens": task.max_tokens}
    most = min(min(site.rows, site.columns) for site in layout.sites)
    return Largest(
        depth=sum(bytes <= room for bytes in depth_bytes(layout, rank, **shapes)),
        rank=bisect_right(range(1, most + 1), room, key=lambda tried: _memory(task, tried, batch)),
        batch=bisect_right(
            range(1, MOST_BATCH + 1), room, key=lambda tried: _memory(task, rank, tried)
        ),
    )


def _memory(task: Task, rank: int, batch: int) -> int:
    """Peak bytes of training an adapter of this rank on all blocks of the unpruned model."""
    layout = task.base.layout
    return training_memory_bytes(
        layout,
        full(layout),
        rank=rank,
        embeddings=task.base.embeddings,
        batch=batch,
        tokens=task.max_tokens,
    )


def _rank(method: Any) -> int:
    """The largest rank in the method's settings; 0 for a method that trains only a head."""
    for name in ("ranks", "largest_width", "rank"):
        if found := getattr(method, name, 0):
            return max(found) if isinstance(found, tuple) else found
    return 0


def _range(values: Iterable[float]) -> Range:
    found = list(values)
    return min(found), max(found)


def _remarks(recipe: Recipe, rounds: Rounds) -> list[str]:
    section, method, first = recipe.fleet, recipe.method, rounds.first
    most, tokens = recipe.task.max_tokens, rounds.task.max_tokens
    twice = "" if tokens == most else f"2 x {most} = "
    last = {one.work.__name__ for one in trainings(first).values()}
    beside = sorted({one.work.__name__ for one in first.exchanges} - last)
    lines = [
        f"every row is assumed to have {twice or 'task.max_tokens = '}{tokens} tokens; shorter "
        "rows take less memory and time",
        f"a device may use at most {USABLE_MEMORY:.0%} of its memory; the seconds of a kind cover "
        "the power modes and links of its devices in the first round, without jitter",
    ]
    if (bits := recipe.run.frozen_bits) is not None:
        lines.append(
            f"the blocks' frozen weights are held in {bits} bits and expanded one layer at a time"
        )
    if beside:
        lines.append(f"before training, the first round also asks for {', '.join(beside)}")
    if section.quorum < 1:
        lines.append(
            f"rounds are planned as if they waited for every reply; fleet.quorum = "
            f"{section.quorum:g} ends them sooner"
        )
    if section.drop or section.delay_seconds:
        lines.append("fleet.drop and fleet.delay_seconds are not planned")
    if recipe.run.seconds:
        lines.append("run.seconds ends the run by its clock, so there is no total of the run")
    if not method.same_shapes:
        lines.append(f"rounds of {method.name} differ in cost, so there is no total of the run")
    return lines
