"""Folders of runs with numbers made up by the test: only what a comparison reads."""

import json

from fedspine.runs import config

ROUND_BYTES = 1_000_000  # of one made round, in both directions together


def made_run(
    folder, *, method="fedlora", seed=0, curve=(0.4, 0.6, 0.7), seconds=10.0, settings=(), **changed
):
    """A finished run of three checks or more, one per round, each of `seconds` simulated seconds;
    returns the folder.

    `curve` is the accuracy (or, for language modelling, the loss) of each check; the final one is
    the last of them unless `changed`, which may set any key of the summary, has another.
    """
    language = "task.kind='causal-lm'" in settings
    rounds = len(curve) + 1
    wanted = [f"method.name='{method}'", f"run.rounds={rounds}", "run.evaluate_every=1", *settings]
    recipe = config.load(None, wanted, seed)
    (folder / "state").mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.toml())
    rows = []
    for round in range(rounds):
        rows.append(
            {
                "row": "exchange",
                "round": round,
                "device": "tx2-00",
                "kind": "tx2",
                "seconds": seconds,
            }
        )
        rows[-1] |= {"bytes_down": ROUND_BYTES // 2, "bytes_up": ROUND_BYTES // 2, "lost": False}
        rows.append(
            {
                "row": "round",
                "round": round,
                "now": seconds * (round + 1),
                "waiting_seconds": 0.3 * seconds,
            }
        )
        value = (*curve, curve[-1])[round]
        score = {
            "row": "score",
            "round": round,
            "now": seconds * (round + 1),
            "final": round == rounds - 1,
        }
        rows.append(
            score | ({"loss": value} if language else {"accuracy": value, "loss": 2 - (value or 0)})
        )
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "test_rows": 500,
        "sparsity": 0.5,
        "loss": 1.0,
    }
    summary |= {
        "loss" if language else "accuracy": curve[-1],
        "simulated_seconds": seconds * rounds,
    }
    summary |= {"waiting_seconds": 0.3 * seconds * rounds, "bytes_up": ROUND_BYTES * rounds // 2}
    summary |= {"bytes_down": ROUND_BYTES * rounds // 2, "peak_memory_bytes_simulated": 50_000_000}
    (folder / "summary.json").write_text(
        json.dumps(summary | {"state_sha256": "ab" * 32} | changed)
    )
    return folder


def made_cell(sweep, name, label, shared=None, **made):
    """The same as a cell of a sweep; `shared` has the settings of all methods."""
    folder = made_run(sweep / "cells" / name, **made)
    record = {"label": label, "settings": shared or {}, "seed": made.get("seed", 0)}
    (folder / "cell.json").write_text(json.dumps(record))
    return folder
