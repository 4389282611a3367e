"""From a recipe to a task and a fleet: load the data and the model, give every device its rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine.core.accountant import needs_accountant
from fedspine.core.aggregation import Mean
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Fleet
from fedspine.core.process import cores
from fedspine.core.task import Arrays, Data, Examples, Task, row_tokens
from fedspine.data.dataset import Dataset, Dialogue
from fedspine.data.tasks import remarks
from fedspine.execution.workers import Workers, Workshop
from fedspine.fleets.hardware import KINDS, Hardware, device_ids, fleet_mix
from fedspine.fleets.lossy import Lossy
from fedspine.fleets.semi_async import SemiAsync
from fedspine.fleets.simulated import SimulatedFleet, profiles
from fedspine.fleets.simulated_world import World
from fedspine.lm.dialogues import settle_template
from fedspine.lm.fits import check_lengths, longest_input
from fedspine.lm.frozen import needs_torchao
from fedspine.lm.load import load as load_model
from fedspine.lm.packing import packed
from fedspine.lm.pooling import READOUTS
from fedspine.lm.precision import choose
from fedspine.lm.prefix import Prefixes, storable
from fedspine.lm.tokens import tokens
from fedspine.lm.vocabulary import Vocabulary
from fedspine.lm.vocabulary import read as read_vocabulary
from fedspine.methods import all_methods
from fedspine.nets.load import load as load_net
from fedspine.runs import task_record
from fedspine.runs.config import Recipe
from fedspine.runs.memory_check import check_memory
from fedspine.runs.optimisation import server_of
from fedspine.runs.own_rows import held_out_by
from fedspine.runs.promise import check_delta, privacy_of
from fedspine.runs.read_data import dataset, modelled, row_shares
from fedspine.runs.readout import auto_pooling
from fedspine.runs.task_record import TaskRecord
from fedspine.runs.vocabulary import reduced, vocabulary_line
from fedspine.storage.records import Records
from fedspine.storage.store import Store

GPU_TOGETHER = 32  # default number of devices trained in one batched pass
# purposes of random streams, which must differ
ORDER, COHORT, START = 101, 102, 103


@dataclass(frozen=True)
class Assembled:
    """Everything that a run needs: checked recipe, task, tokenizer, the devices' rows."""

    recipe: Recipe
    task: Task
    tokenizer: Any
    shares: tuple[np.ndarray, ...]  # int64 row indices of the training set, by device
    held_out: tuple[np.ndarray, ...]  # the same of rows on which a device is scored, not trained
    kinds: tuple[str, ...]
    record: TaskRecord
    left_out: Mapping[str, int]  # unused rows of the data, by reason
    remarks: tuple[str, ...]  # remarks on how the data was read, one line each
    # of the test rows, where answers are learnt
    dialogues: tuple[Dialogue, ...] | None = None
    vocabulary: Vocabulary | None = None  # None: all tokens are kept


def assemble(recipe: Recipe, *, here: bool = True, begun: Path | None = None) -> Assembled:
    """Load and check everything a run needs; raises BadInput before anything is spent.

    Unless the devices' rows are `here`, in the recipe's data, only the test rows are read.
    `begun` is the folder of a resumed run, which must have begun with the same data and base.
    """
    then = None if begun is None else task_record.read(begun)
    recipe, _ = modelled(recipe)
    _check_family(recipe)
    if recipe.privacy.promised:
        needs_accountant()
    needs_torchao(recipe.run.frozen_bits)
    kinds = fleet_mix(recipe.fleet.mix, recipe.fleet.devices)
    computing = _computing(recipe.run.device)
    with task_record.needing("data", recipe.task.data, begun):
        data = dataset(recipe)
    record = task_record.record_of(recipe, data, here=here)
    if then is not None:
        task_record.check_data(then, record, begun)
    with task_record.needing("base", recipe.task.model, begun):
        kept = None if then is None or then.encoding is None else task_record.base_of(begun)
        task, tokenizer = build_task(recipe, data, kept=kept)
    record = task_record.on_base(record, task.base)
    if then is not None:
        task_record.check_base(then, record.model_sha256, recipe.task.model, begun)
    task, tokenizer, words, lines = _with_words(recipe, data, task, tokenizer, kept)
    task.base.to(computing)
    noted = _without_room(data, task)
    if recipe.run.answers and (recipe.task.kind == "array" or data.test.dialogues is None):
        raise BadInput(
            f"run.answers is {recipe.run.answers}, but the rows of {recipe.task.data} are not "
            "prompts with answers; set it to 0"
        )
    shares = share_out(recipe, data, task.train) if here else ()
    if recipe.task.pack:
        task, shares = _packed(recipe, task, shares, here=here)
    shares, held_out = held_out_by(recipe, shares)
    check_delta(recipe, [len(share) for share in shares])
    recipe.method.check(task)
    if here:
        check_memory(recipe.method, task, [KINDS[kind].memory_bytes for kind in kinds])
    return Assembled(
        recipe=recipe,
        task=task,
        tokenizer=tokenizer,
        shares=shares,
        held_out=held_out,
        kinds=tuple(kinds),
        record=record,
        left_out=data.left_out,
        remarks=(*remarks(data), *noted, *lines),
        dialogues=None if recipe.task.kind == "array" else data.test.dialogues,
        vocabulary=words,
    )


def settled(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with its open choices decided, and a line about each decision.

    Raises BadInput for a model that cannot be found or chosen, and for a missing GPU.
    """
    recipe, line = modelled(recipe)
    choices: dict[str, dict[str, Any]] = {}
    lines = [] if line is None else [line]
    if recipe.task.kind == "array":
        choices["run"] = {"precision": "fp32"}  # nets know no other
    elif precision := choose(recipe.run.precision, _computing(recipe.run.device)):
        choices["run"] = {"precision": precision.precision}
        lines.append(precision.line)
    if ("task", "pooling") in recipe.open_choices:
        pooling = auto_pooling(recipe)
        choices["task"] = {"pooling": pooling}
        lines.append(f"readout: {READOUTS[pooling]}")
    return recipe.choosing(choices), lines


def _family(recipe: Recipe) -> str:
    return "net" if recipe.task.kind == "array" else "transformer"


def identities(recipe: Recipe) -> list[str]:
    """The ids of the recipe's devices."""
    return device_ids(fleet_mix(recipe.fleet.mix, recipe.fleet.devices))


def _check_family(recipe: Recipe) -> None:
    """Raise BadInput for a method that cannot train this kind of model."""
    family = _family(recipe)
    if family not in recipe.method.models:
        able = ", ".join(name for name, method in all_methods().items() if family in method.models)
        raise BadInput(
            f"method {recipe.method.name!r} cannot train {recipe.task.model!r}, a {family}; choose "
            f"one of {able}, or another task.model"
        )


def build_task(recipe: Recipe, data: Dataset, *, kept: Path | None = None) -> tuple[Task, Any]:
    """The task and the tokenizer; `kept` is the folder with a run's own configuration of these."""
    section = recipe.task
    if section.kind == "array":
        return _array_task(recipe, data), None
    base, tokenizer = load_base(recipe, len(data.label_names), kept=kept)
    longest, answer = longest_input(base.config, tokenizer), recipe.run.tokens_answered
    check_lengths(section.model, base.config, longest, section.max_tokens, answer)
    if data.train.dialogues is not None:
        settle_template(tokenizer)
    train, test = _encoded(recipe, data, base, tokenizer)
    task = Task(
        kind=section.kind,
        base=base,
        train=train,
        test=test,
        label_names=data.label_names,
        max_tokens=row_tokens(base.pooling, section.max_tokens),
        rounds=recipe.run.rounds,
        turns=turns_of(recipe) if storable(base, train) else 0.0,
        privacy=privacy_of(recipe),
    )
    return task, tokenizer


def _encoded(recipe: Recipe, data: Dataset, base: Any, tokenizer: Any) -> tuple[Examples, Examples]:
    """The rows to train on and those to test on, as tokens."""
    how, bi_encoder = (recipe.task.kind, recipe.task.max_tokens), base.pooling == "bi-encoder"
    train = tokens(tokenizer, data.train, *how, bi_encoder=bi_encoder)
    return train, tokens(tokenizer, data.test, *how, scored=True, bi_encoder=bi_encoder)


def _with_words(
    recipe: Recipe, data: Dataset, task: Task, tokenizer: Any, kept: Path | None
) -> tuple[Task, Any, Vocabulary | None, list[str]]:
    """The task and the tokenizer with the vocabulary that the recipe keeps, that vocabulary, and a
    line about it; `kept` is the folder of a run that has chosen it already.
    """
    if recipe.task.vocabulary is None:
        return task, tokenizer, None, []
    if (found := read_vocabulary(kept)) is not None:  # by which all was cut when it was loaded
        return task, tokenizer, found, []
    shares = share_out(recipe, data, task.train)
    tokenizer, found = reduced(recipe, data, task, tokenizer, shares)
    train, test = _encoded(recipe, data, task.base, tokenizer)
    task = replace(task, train=train, test=test)
    return task, tokenizer, found, [vocabulary_line(recipe, found)]


def load_base(
    recipe: Recipe, classes: int, *, precision: str | None = None, kept: Path | None = None
) -> tuple[Any, Any]:
    """The recipe's transformer, in its precision or another, and the tokenizer."""
    section = recipe.task
    return load_model(
        section.model,
        kind=section.kind,
        classes=classes,
        precision=precision or recipe.run.precision,
        layers=section.layers,
        pooling=section.pooling,
        kept=kept,
        bits=recipe.run.frozen_bits,
    )


def _array_task(recipe: Recipe, data: Dataset) -> Task:
    splits = [(rows.x, rows.labels) for rows in (data.train, data.test)]
    net, train, test = load_net(recipe.task.model, *splits, classes=len(data.label_names))
    return Task(
        kind="array",
        base=net,
        train=train,
        test=test,
        label_names=data.label_names,
        max_tokens=1,
        rounds=recipe.run.rounds,
        turns=0.0,
    )


def share_out(recipe: Recipe, data: Dataset, train: Data) -> tuple[np.ndarray, ...]:
    """The rows of the encoded training set `train` that each device holds."""
    shares = row_shares(recipe, data)
    if isinstance(train, Arrays) or train.sources is None:
        return tuple(shares)
    first = np.searchsorted(train.sources, np.arange(len(data.train) + 1))
    held = tuple(
        np.concatenate([np.arange(first[row], first[row + 1]) for row in share]) for share in shares
    )
    for device, rows in zip(identities(recipe), held, strict=True):
        if not len(rows):  # of texts there is always one
            raise BadInput(
                f"device {device} has no row whose prompt leaves room for an answer within "
                f"task.max_tokens = {recipe.task.max_tokens}; raise it, or take fewer devices"
            )
    return held


def _without_room(data: Dataset, task: Task) -> list[str]:
    """A remark about dialogues whose prompts fill all of `task.max_tokens`."""
    if task.kind != "causal-lm" or data.train.dialogues is None:
        return []
    rows = len(data.train) + len(data.test)
    found = sum(len(np.unique(split.sources)) for split in (task.train, task.test))
    if found == rows:
        return []
    return [
        f"{rows - found:,} of {rows:,} rows are left out: their prompts fill task.max_tokens = "
        f"{task.max_tokens}"
    ]


def _packed(
    recipe: Recipe, task: Task, shares: tuple[np.ndarray, ...], *, here: bool
) -> tuple[Task, tuple[np.ndarray, ...]]:
    """The task and the shares with several short texts in a row."""
    if not here:
        raise BadInput("task.pack is for simulated devices, not for real sites; leave it out")
    train, shares = packed(task.train, shares, recipe.task.max_tokens)
    return replace(task, train=train), shares


def test_order(assembled: Assembled) -> np.ndarray:
    """The order in which test rows are scored; a check uses the first ones."""
    return np.random.default_rng([assembled.recipe.run.seed, ORDER]).permutation(
        len(assembled.task.test)
    )


def workers_for(assembled: Assembled, cache: Path) -> Workers:
    """Processes that serve asks and score models; `cache` is a folder for stored activations."""
    run, task = assembled.recipe.run, assembled.task
    workshop = Workshop(
        task=task,
        shares=assembled.shares,
        held_out=assembled.held_out,
        test_rows=test_order(assembled),
        prefixes=Prefixes(cache),
    )
    if task.base.device.type == "cuda":  # which a forked process could not use
        return Workers(workshop, 0, run.together or GPU_TOGETHER)
    return Workers(workshop, run.workers or cores(), run.together or 1)


def _computing(device: str) -> torch.device:
    """The compute device; raises BadInput for a missing GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput('run.device is "cuda", but PyTorch sees no GPU here; choose "cpu" or "auto"')
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def begun(recipe: Recipe, task: Task) -> Any:
    """The method's state before the first round."""
    return recipe.method.start(task, np.random.default_rng([recipe.run.seed, START]))


def hardware_of(recipe: Recipe, kinds: Sequence[str]) -> Hardware:
    """The true speeds of the recipe's simulated devices, which are of these kinds."""
    return Hardware(
        seed=recipe.run.seed,
        kinds=tuple(kinds),
        spread=recipe.fleet.spread,
        round_trip_seconds=tuple(recipe.fleet.round_trip_seconds),
    )


def turns_of(recipe: Recipe) -> float:
    """How often a device trains in the whole run, on average."""
    return recipe.run.rounds * min(1.0, recipe.fleet.per_round / recipe.fleet.devices)


def simulate(
    assembled: Assembled, workers: Workers, store: Store, records: Records
) -> SimulatedFleet:
    """The simulated fleet that the recipe describes."""
    recipe = assembled.recipe
    world = World(
        seed=recipe.run.seed,
        profiles=profiles(list(assembled.kinds), [len(share) for share in assembled.shares]),
        hardware=hardware_of(recipe, assembled.kinds),
        workers=workers,
        store=store,
        records=records,
        aggregation=recipe.fleet.aggregation or Mean(),
        server=server_of(recipe.method, recipe.fleet),
        privacy=assembled.task.privacy,
        noise=recipe.fleet.noise or 0.0,
        early=() if assembled.vocabulary is None else assembled.vocabulary.exchanges,
    )
    return SimulatedFleet(world)


def cohort(recipe: Recipe, round: int, devices: int | None = None) -> np.ndarray:
    """Indices of the devices that take part in a round, counted from 0, in ascending order.

    There are as many `devices` as the recipe says, unless a fleet has grown since.

    Devices take turns in a random order, which is drawn anew once all have had equally many turns.
    So none is asked twice in a round, and the numbers of turns of two devices never differ by more
    than one.
    """
    devices = devices or recipe.fleet.devices
    wanted = min(recipe.fleet.per_round, devices)
    period = devices // math.gcd(devices, wanted)  # rounds until all have had equally many turns
    order = np.random.default_rng([recipe.run.seed, COHORT, round // period]).permutation(devices)
    places = np.arange(wanted) + round % period * wanted
    return np.sort(order[places % devices])


def around(recipe: Recipe, fleet: Fleet, in_flight: Mapping[DeviceId, int]) -> Fleet:
    """The part of a fleet that a round asks, wrapped so that it loses and delays messages and ends
    the round as the recipe says.

    `in_flight` is that of the whole fleet (`fleets.rounds`).
    """
    section = recipe.fleet
    if section.drop or section.delay_seconds:
        fleet = Lossy(
            fleet, drop=section.drop, delay_seconds=section.delay_seconds, seed=recipe.run.seed
        )
    if section.quorum < 1:
        late_work = recipe.method.merges_late
        fleet = SemiAsync(fleet, quorum=section.quorum, late_work=late_work, in_flight=in_flight)
    return fleet
