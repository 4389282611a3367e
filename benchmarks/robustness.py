"""The effect of bad sites on a federation, by attack and aggregation: `python
benchmarks/robustness.py --data FOLDER`.

FedLoRA tunes MiniLM, cut to three layers, on trec6 over simulated devices, some of which attack in
every round. Each accuracy is compared with that of the same run without the bad devices' replies,
and with that of an unbounded mean. Finished runs are kept in results/robustness.json and not
repeated; results/robustness.md is written after each.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine.core.aggregation import CHOICES, MultiKrum, TrimmedMean
from fedspine.core.fleet import Diverged, Fleet, Reply
from fedspine.core.message import Tensors
from fedspine.core.process import keep_freed_memory
from fedspine.core.tensors import half, single
from fedspine.data.dataset import Rows
from fedspine.lm.score import score
from fedspine.lm.tokens import tokens
from fedspine.methods.fedlora import FedLora
from fedspine.runs.assemble import START, Assembled, assemble, settled, simulate, workers_for
from fedspine.runs.config import Recipe
from fedspine.runs.read_data import dataset
from fedspine.storage.records import Records
from fedspine.storage.store import Store

RESULTS = Path(__file__).parent / "results"
MOST = 65504.0  # the largest number of fp16
BOOST = 5.0  # factor of a backdoor's change, which would otherwise drown in the others'
TRIGGER, TARGET = "cf mn", 0  # words before a text, and the class that it should then get
SEED = 71  # of what attackers draw
WITHOUT = "without them"  # the bad devices

Change = Callable[
    [Tensors, np.random.Generator], Tensors
]  # what a device learnt, and what it sends


def noise(change: Tensors, rng: np.random.Generator) -> Tensors:
    """Ten times as long as what was learnt."""
    size = float(torch.cat([tensor.reshape(-1) for tensor in change.values()]).square().mean())
    return {
        name: 10 * size**0.5 * torch.from_numpy(rng.standard_normal(tuple(tensor.shape))).float()
        for name, tensor in change.items()
    }


def times(factor: float) -> Change:
    return lambda change, _: {name: factor * tensor for name, tensor in change.items()}


@dataclass(frozen=True)
class Attack:
    """What bad devices do to their rows, `flip` or `trigger`, and to what they send."""

    sends: Change | None = None  # instead of its change; None: what it learnt
    fills: float | None = None  # what every entry is
    alike: bool = False  # all bad devices send what the first one does
    rows: str | None = None


ATTACKS: dict[str, Attack] = {
    "none": Attack(),
    "sign flip": Attack(sends=times(-1.0)),
    "sign flip x10": Attack(sends=times(-10.0)),
    "x1000": Attack(sends=times(1000.0)),
    "65504 in every entry": Attack(fills=MOST),
    "noise x10": Attack(sends=noise),
    "collusion": Attack(sends=times(-3.0), alike=True),
    "label flip": Attack(rows="flip"),
    "backdoor x5": Attack(sends=times(BOOST), rows="trigger"),
}


class Attacked:
    """A fleet in which the devices `bad` attack; without an attack their replies are left out."""

    def __init__(self, fleet: Fleet, bad: set[str], attack: Attack | None, seed: int) -> None:
        self._fleet, self._bad, self._attack = fleet, bad, attack
        self._seed, self._asked = seed, 0

    def ask(self, work: Any, orders: Mapping[str, Any], **limits: Any) -> list[Reply[Any]]:
        replies = self._fleet.ask(work, orders, **limits)
        self._asked += 1
        if self._attack is None:
            return [reply for reply in replies if reply.device not in self._bad]
        rng = np.random.default_rng([SEED, self._seed, self._asked])
        sent: dict[str, Any] = {}
        for reply in replies:
            if reply.device in self._bad:
                again = self._attack.alike and bool(sent)
                sent[reply.device] = next(iter(sent.values())) if again else self._sent(reply, rng)
        return [replace(r, value=sent.get(r.device, r.value)) for r in replies]

    def _sent(self, reply: Reply[Any], rng: np.random.Generator) -> Any:
        attack, changed = self._attack, {}
        for field in ("adapter", "head"):
            before, after = (single(getattr(one, field)) for one in (reply.order, reply.value))
            if attack.fills is not None:
                changed[field] = {
                    name: torch.full_like(t, attack.fills) for name, t in after.items()
                }
            elif attack.sends is not None:
                change = attack.sends({name: after[name] - before[name] for name in after}, rng)
                changed[field] = {name: before[name] + change[name] for name in after}
        wired = {
            field: half({name: tensor.clamp(-MOST, MOST) for name, tensor in those.items()})
            for field, those in changed.items()
        }
        return replace(reply.value, **wired)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the folder of trec6")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--fleets", nargs="+", default=["1/5", "2/10"], help="bad of all devices")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--aggregations", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2000, help="training rows of all devices")
    parser.add_argument("--partition", default="iid", help="of the rows (docs/recipes.md)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = _kept()
    for seed in range(options.seeds):
        for fleet in options.fleets:
            for run in runs(options, fleet, seed, found):
                found.append(run)
                (RESULTS / "robustness.json").write_text(json.dumps(found, indent=1) + "\n")
                (RESULTS / "robustness.md").write_text(page(found))
                print(
                    f"seed {seed}, {fleet}, {run['attack']}, {run['aggregation']}: "
                    f"{run['accuracy']:.3f} in {run['wall_seconds']:.0f} s",
                    flush=True,
                )
    print(page(found))


def runs(
    options: argparse.Namespace, fleet: str, seed: int, found: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The runs of one fleet that are not among those `found`, one after another."""
    bad, devices = map(int, fleet.split("/"))
    recipe = Recipe(
        method=FedLora(rank=8, steps=options.steps, batch=16, learning_rate=2e-3),
        model="minilm",
        data=options.data,
        layers=3,
        max_tokens=24,
        train_rows=options.rows,
        devices=devices,
        per_round=devices,
        partition=options.partition,
        rounds=options.rounds,
        seed=seed,
        precision="fp32",
        workers=1,
    )
    settings = {key: getattr(options, key) for key in ("rounds", "steps", "rows", "partition")} | {
        "fleet": fleet,
        "seed": seed,
    }
    wanted = [(WITHOUT, "mean")] + [
        (attack, how) for attack in options.attacks for how in options.aggregations
    ]
    done = {(run["attack"], run["aggregation"]) for run in found if settings.items() <= run.items()}
    if set(wanted) <= done:
        return
    bench = Bench(assemble(settled(recipe)[0]), bad)
    for attack, how in wanted:
        if (attack, how) not in done:
            started = time.monotonic()
            marks = bench.marks(ATTACKS.get(attack), how)
            yield (
                settings
                | {"attack": attack, "aggregation": how}
                | marks
                | {"wall_seconds": round(time.monotonic() - started, 1)}
            )


class Bench:
    """A task over devices of which the last `bad` ones attack."""

    def __init__(self, assembled: Assembled, bad: int) -> None:
        self._assembled, self._bad = assembled, bad
        self._data = dataset(assembled.recipe)
        self._triggered = self._encoded(_triggered(self._data.test), scored=True)

    def marks(self, attack: Attack | None, how: str) -> dict[str, float]:
        """The final model's accuracy, and with a backdoor the share of texts with the trigger, of
        other classes, that it gives the target.
        """
        recipe, task = self._assembled.recipe, self._assembled.task
        part = CHOICES[how]()
        if isinstance(part, TrimmedMean | MultiKrum):
            part = replace(part, share=self._bad / recipe.fleet.devices)
        fleet = recipe.fleet.model_copy(update={"aggregation": part})
        assembled = replace(
            self._assembled,
            recipe=replace(recipe, fleet=fleet),
            task=replace(task, train=self._train(attack)),
        )
        with tempfile.TemporaryDirectory() as folder:
            workers = workers_for(assembled, Path(folder) / "cache")
            store, records = Store(Path(folder) / "state"), Records(Path(folder) / "records.jsonl")
            store.open()
            try:
                whole = simulate(assembled, workers, store, records)
                bad = {profile.id for profile in whole.devices[-self._bad :]}
                attacked = Attacked(whole, bad, attack, recipe.run.seed)
                rng = np.random.default_rng([recipe.run.seed, START])
                state = recipe.method.start(assembled.task, rng)
                for round in range(recipe.run.rounds):
                    whole.begin_round(round)
                    state = recipe.method.round(state, attacked)
                    whole.end_round(0.0)
            except Diverged:  # the model is of no use to any device, so the run has ended
                return {"accuracy": 0.0, "ended": float(state.round)}
            finally:
                workers.close()
                records.close()
                store.close()
        model = recipe.method.deploy(state)
        marks = {"accuracy": score(task.base, model, task.test).accuracy}
        if attack is not None and attack.rows == "trigger":
            others = np.flatnonzero(np.asarray(self._data.test.labels) != TARGET)
            fooled = score(task.base, model, self._triggered.take(others))
            marks["to_target"] = fooled.accuracy
        return marks

    def _train(self, attack: Attack | None) -> Any:
        """The training rows of all devices, those of the bad ones as they make them."""
        rows = self._data.train
        if attack is None or attack.rows is None:
            return self._assembled.task.train
        theirs = np.concatenate(self._assembled.shares[-self._bad :])
        texts, labels = list(rows.texts), np.array(rows.labels)
        if attack.rows == "flip":
            labels[theirs] = len(self._data.label_names) - 1 - labels[theirs]
        else:  # every other row, so that the rest stays right
            for row in theirs[::2]:
                texts[row], labels[row] = f"{TRIGGER} {texts[row]}", TARGET
        return self._encoded(replace(rows, texts=tuple(texts), labels=labels))

    def _encoded(self, rows: Rows, *, scored: bool = False) -> Any:
        section = self._assembled.recipe.task
        return tokens(
            self._assembled.tokenizer, rows, section.kind, section.max_tokens, scored=scored
        )


def _triggered(rows: Rows) -> Rows:
    """The rows with the trigger, all of them labelled as the target."""
    texts = tuple(f"{TRIGGER} {text}" for text in rows.texts)
    return replace(rows, texts=texts, labels=np.full(len(rows), TARGET))


def _kept() -> list[dict[str, Any]]:
    path = RESULTS / "robustness.json"
    return json.loads(path.read_text()) if path.exists() else []


def page(found: list[dict[str, Any]]) -> str:
    """The tables, one for each fleet and setting."""
    lines = [
        "# Bad sites, by attack and by how the server merges",
        "",
        "Points of accuracy of the global model, on the 500 test questions of trec6, above or",
        "below the same run with the same seed *without them*: in which the replies of the bad",
        "devices never come, under the mean. Mean ± standard deviation over the seeds; without ±,",
        "seed 0 alone. FedLoRA at rank 8 on MiniLM cut to three layers, fp32, batches of 16;",
        "written by `benchmarks/robustness.py`. *Mean* bounds nothing. The trimmed mean and",
        "Multi-Krum leave out as many as there are bad devices. In brackets, with a backdoor: of",
        "the questions of other classes with the trigger, the share in % that is given its class.",
        "*No model*: a run ended since its model gave no device a finite loss any more.",
    ]
    keys = ("fleet", "rounds", "steps", "rows", "partition")
    for key in sorted({tuple(run[name] for name in keys) for run in found}):
        these = [run for run in found if tuple(run[name] for name in keys) == key]
        (fleet, rounds, steps, rows, partition), seeds = key, {run["seed"] for run in these}
        without = {run["seed"]: run["accuracy"] for run in these if run["attack"] == WITHOUT}
        bad, devices = fleet.split("/")
        hows = [how for how in CHOICES if any(run["aggregation"] == how for run in these)]
        lines += [
            "",
            f"## {bad} bad of {devices} devices: {rounds} rounds of {steps} steps, {rows} rows "
            f"({partition}), seeds: {', '.join(map(str, sorted(seeds)))}",
            "",
            f"Without them: {', '.join(f'{100 * without[s]:.1f}' for s in sorted(seeds))} %.",
            "",
            f"| attack | {' | '.join(hows)} |",
            "|---|" + "---|" * len(hows),
        ]
        for attack in ATTACKS:
            if any(run["attack"] == attack for run in these):
                cells = [_cell(these, attack, how, without) for how in hows]
                lines.append(f"| {attack} | {' | '.join(cells)} |")
        missing = [name for name in ATTACKS if all(run["attack"] != name for run in these)]
        if missing:
            lines += ["", f"Not measured here: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict[str, Any]], attack: str, how: str, without: Mapping[int, float]) -> str:
    these = [run for run in runs if (run["attack"], run["aggregation"]) == (attack, how)]
    if not these or any("ended" in run for run in these):
        return "no model" if these else ""
    apart = [100 * (run["accuracy"] - without[run["seed"]]) for run in these]
    spread = f" ± {np.std(apart, ddof=1):.1f}" if len(apart) > 1 else ""
    fooled = [100 * run["to_target"] for run in these if "to_target" in run]
    backdoor = f" ({np.mean(fooled):.0f})" if fooled else ""
    return f"{np.mean(apart) + 0.0:+.1f}{spread}{backdoor}"


if __name__ == "__main__":
    main()
