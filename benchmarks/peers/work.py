"""The work that every contender does: the same rows on the same devices in the same rounds, from
the same start.

`prepare` writes it down once per seed; contenders read it, so none pays for making it while the
clock runs.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedspine.core.task import Examples
from fedspine.data.dataset import Dataset, Rows
from fedspine.lm.tune import batches
from fedspine.lm.tuning import Tuning, tuning_at
from fedspine.runs.assemble import START, assemble, cohort
from fedspine.runs.config import Recipe, recipe

Padding: TypeAlias = Literal["fixed", "bucketed"]
Precision: TypeAlias = Literal["fp32", "bf16"]
_SPLITS = ("train", "test")
_TEST_ROWS = 7  # a stream of random numbers of its own


@dataclass(frozen=True)
class Settings:
    """What is done; the learning rate falls linearly to zero over the rounds."""

    seed: int = 0
    rounds: int = 4
    devices: int = 80
    per_round: int = 10
    steps: int = 10
    batch: int = 16
    rank: int = 8
    scale: float = 2.0  # alpha / rank
    learning_rate: float = 2e-3
    max_tokens: int = 64
    partition: str = "dirichlet"

    @property
    def samples_per_round(self) -> int:
        return self.per_round * self.steps * self.batch


@dataclass(frozen=True)
class Way:
    """How a peer trains: `padding` "fixed" is to the full length in random order, "bucketed" as
    fedspine does it.
    """

    precision: Precision = "fp32"  # of the frozen base
    padding: Padding = "fixed"
    attention: str = "sdpa"  # transformers' name; sdpa is its default


@dataclass(frozen=True)
class Outcome:
    """What one contender did: seconds of each round, of its training passes where known, the final
    accuracy.
    """

    rounds: list[float]
    passes: list[float] | None  # seconds inside local training by round, summed over the processes
    processes: int  # that train at once
    accuracy: float | None
    notes: dict[str, float] | None = None


@dataclass(frozen=True)
class Work:
    """The folder that `prepare` filled."""

    folder: Path

    @cached_property
    def settings(self) -> Settings:
        return Settings(**json.loads((self.folder / "settings.json").read_text()))

    def recipe(self, *, precision: str = "bf16", workers: int = 0, **method: Any) -> Recipe:
        """The same work as a fedspine recipe; `method` names another method or sets its fields."""
        return recipe(_tables(self.settings, self.folder, precision, workers, method))

    @cached_property
    def train(self) -> Examples:
        return self._examples("train")

    @cached_property
    def test(self) -> Examples:
        return self._examples("test")

    @cached_property
    def shares(self) -> list[np.ndarray]:
        """The rows of each device."""
        return np.split(np.load(self.folder / "rows.npy"), np.load(self.folder / "ends.npy")[:-1])

    @property
    def classes(self) -> int:
        return self._schedule["classes"]

    def initial(self) -> dict[str, Tensor]:
        """Adapter and head to start from, fp32, by fedspine's names."""
        return load_file(self.folder / "initial.safetensors")

    @cached_property
    def plan(self) -> list[list[tuple[int, int]]]:
        """For each round the devices that take part, each with how often it was asked before."""
        return [[tuple(one) for one in chosen] for chosen in self._schedule["plan"]]

    def tuning(self, round: int) -> Tuning:
        """How a device trains in this round."""
        return Tuning(**self._schedule["tunings"][round])

    @cached_property
    def _schedule(self) -> dict[str, Any]:
        return json.loads((self.folder / "schedule.json").read_text())

    def inputs(
        self, device: int, asked: int, round: int, padding: Padding
    ) -> Iterator[dict[str, Tensor]]:
        """The batches of one device: the rows that fedspine draws, in its order, or shuffled and
        all of full length.
        """
        data, tuning = self.train.take(self.shares[device]), self.tuning(round)
        rng = np.random.default_rng((self.settings.seed, device, asked))
        drawn = list(batches(data, tuning, rng))
        if padding == "bucketed":
            yield from map(data.batch, drawn)
            return
        shuffled = rng.permutation(np.concatenate(drawn))
        for start in range(0, len(shuffled), tuning.batch):
            yield _lengthened(
                data.batch(shuffled[start : start + tuning.batch]), self.settings.max_tokens, data
            )

    def _examples(self, split: str) -> Examples:
        def part(name: str) -> np.ndarray:
            return np.load(self.folder / f"{split}-{name}.npy", mmap_mode="r")

        padding = int(np.load(self.folder / "padding.npy"))
        offsets, labels = np.array(part("offsets")), np.array(part("labels"))
        return Examples(
            ids=part("ids"), offsets=offsets, labels=labels, segments=None, padding=padding
        )


def _lengthened(inputs: dict[str, Tensor], tokens: int, data: Examples) -> dict[str, Tensor]:
    missing = tokens - inputs["input_ids"].shape[1]
    fill = {"input_ids": data.padding, "attention_mask": 0}
    return {
        name: nn.functional.pad(tensor, (0, missing), value=fill[name]) if name in fill else tensor
        for name, tensor in inputs.items()
    }


def prepare(folder: Path, data: Dataset, settings: Settings, test_rows: int) -> Work:
    """Write everything that contenders need into `folder`, which is made."""
    folder.mkdir()
    rng = np.random.default_rng(_TEST_ROWS)  # the same test rows for every seed
    tested = np.sort(rng.permutation(len(data.test.texts))[:test_rows])
    (folder / "data").mkdir()
    rows = len(data.train.texts)
    # repeated where devices would go without
    trained = np.resize(np.arange(rows), max(rows, settings.devices))
    _write(folder / "data" / "train.parquet", data.train, trained, data.label_names)
    _write(folder / "data" / "test.parquet", data.test, tested, data.label_names)
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    work = Work(folder)
    assembled = assemble(work.recipe(precision="fp32"))
    for split in _SPLITS:
        examples: Examples = getattr(assembled.task, split)
        for name in ("ids", "offsets", "labels"):
            np.save(folder / f"{split}-{name}.npy", getattr(examples, name))
    np.save(folder / "padding.npy", assembled.task.train.padding)
    np.save(folder / "rows.npy", np.concatenate(assembled.shares))
    np.save(folder / "ends.npy", np.cumsum([len(share) for share in assembled.shares]))
    (folder / "schedule.json").write_text(
        json.dumps({"classes": len(data.label_names), **_schedule(assembled.recipe)})
    )
    state = assembled.recipe.method.start(
        assembled.task, np.random.default_rng([settings.seed, START])
    )
    tensors = {**state.adapter, **state.head}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "initial.safetensors",
    )
    return work


def _schedule(recipe: Recipe) -> dict[str, Any]:
    asked: Counter[int] = Counter()
    plan, tunings = [], []
    for number in range(recipe.run.rounds):
        chosen = cohort(recipe, number).tolist()
        plan.append([(device, asked[device]) for device in chosen])
        asked.update(chosen)
        tunings.append(asdict(tuning_at(recipe.method, number, recipe.run.rounds)))
    return {"plan": plan, "tunings": tunings}


def _write(path: Path, rows: Rows, chosen: np.ndarray, names: tuple[str, ...]) -> None:
    labels = np.asarray(rows.labels)[chosen]
    table = pa.table({"text": [rows.texts[row] for row in chosen], "label": labels})
    pq.write_table(table.replace_schema_metadata({"label_names": json.dumps(names)}), path)


def _tables(
    settings: Settings, folder: Path, precision: str, workers: int, method: dict[str, Any]
) -> dict[str, Any]:
    return {
        "task": {
            "model": "minilm",
            "data": str(folder / "data"),
            "max_tokens": settings.max_tokens,
            "pooling": "cls",  # the head that PEFT trains in the peers
        },
        "fleet": {
            "devices": settings.devices,
            "per_round": settings.per_round,
            "partition": settings.partition,
        },
        "method": {
            "name": "fedlora",
            **({} if "name" in method else {"rank": settings.rank}),
            "scale": settings.scale,
            "steps": settings.steps,
            "batch": settings.batch,
            "learning_rate": settings.learning_rate,
            **method,
        },
        "run": {
            "rounds": settings.rounds,
            "seed": settings.seed,
            "precision": precision,
            "evaluate_every": 0,
            "final_devices": 1,
            "workers": workers,
            "device": "cpu",  # as for all contenders
        },
    }
