"""Settings of federated optimisation: in recipes, refused where they do not go together, and in a
run whose devices keep heads of their own.
"""

import functools

import numpy as np
import pytest
from runs import in_process, summary_of, tiny_job, write_csv

from fedspine.core.errors import BadInput
from fedspine.core.logit_adjustment import OwnLabelSkew
from fedspine.core.server_optimiser import Accumulated, FedAdam, FedAvgM, NoOptimiser
from fedspine.lm.drift import FedDyn, FedProx
from fedspine.lm.schedules import Cosine, Linear
from fedspine.methods import all_methods
from fedspine.methods.fedlora import FedLora
from fedspine.runs import config
from fedspine.runs.config import Recipe
from fedspine.runs.optimisation import server_of
from fedspine.runs.own_rows import held_out_of


@pytest.mark.parametrize("name", all_methods())
def test_a_recipe_that_says_nothing_is_what_it_was(name):
    tables = Recipe(method=name).table()
    assert not {"server_optimiser", "held_out"} & tables["fleet"].keys()
    new = {"schedule", "drift", "keep_optimiser", "personal_head", "head_weights", "teacher"}
    assert not new & tables["method"].keys()


def test_a_recipe_that_was_written_out_is_the_same(tmp_path):
    method = FedLora(schedule=Cosine(warmup_rounds=2), drift=FedProx(mu=0.1), personal_head=True)
    recipe = Recipe(method=method, server_optimiser=FedAdam(tau=0.1), held_out=0.2)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.toml())
    again = config.load(path)
    assert again == recipe
    assert again.method == method and again.fleet.server_optimiser == FedAdam(tau=0.1)
    assert recipe.difference(again) is None
    other = config.load(path, ["method.drift.mu=0.2", "method.schedule.name=linear"])
    assert other.method.drift == FedProx(mu=0.2) and other.method.schedule == Linear()
    other = config.load(path, ["method.drift.mu=0.2"])
    assert recipe.difference(other) == "method.drift.mu is 0.1 there, 0.2 here"


def test_settings_on_the_command_line():
    recipe = config.load(
        None,
        [
            "method.name=fedlora",
            "method.drift.name=feddyn",
            "method.schedule.warmup_rounds=3",
            "method.head_weights=labels",
        ],
    )
    assert recipe.method.drift == FedDyn() and recipe.method.schedule == Linear(warmup_rounds=3)
    assert server_of(recipe.method, recipe.fleet).optimiser == Accumulated(
        share=recipe.fleet.per_round / recipe.fleet.devices
    )
    given = config.load(None, ["fleet.server_optimiser={name='fedavgm', momentum=0.5}"])
    assert server_of(given.method, given.fleet).optimiser == FedAvgM(momentum=0.5)
    plain = config.load(None)
    assert server_of(plain.method, plain.fleet).optimiser == NoOptimiser()


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("method.teacher.adapter=mine", "method.teacher"),
        ("method.teacher.temperature=hot", "method.teacher.temperature is 'hot'"),
        ("method.teacher.name=sparse", "unknown method.teacher.name 'sparse'"),
        ("method.schedule.warmup=3", "did you mean 'warmup_rounds'"),
        ("method.drift.alpha=0.1", "unknown key of .method.drift. for none 'alpha'"),
    ],
)
def test_what_a_part_lacks_is_refused_in_one_line(setting, line):
    begun = ["method.name=magnitude", "method.teacher.name=dense"]
    with pytest.raises(BadInput, match=line) as refused:
        config.load(None, [*begun, setting])
    assert "\n" not in str(refused.value)


PRIVATE = {"epsilon": 8.0, "delta": 1e-5}


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        (FedLora(), {"server_optimiser": "adam"}, "unknown fleet.server_optimiser.name 'adam'"),
        (FedLora(), {"server_optimiser": 3}, "fleet.server_optimiser"),
        (
            FedLora(),
            {"server_optimiser": {"name": "fedavgm", "momentum": 1.0}},
            "fleet.server_optimiser.momentum is 1, but 0 to below 1",
        ),
        (
            FedLora(drift=FedDyn()),
            {"server_optimiser": "fedavgm"},
            "feddyn, which has a server step of its own",
        ),
        (
            FedLora(schedule=Linear(warmup_rounds=5)),
            {"rounds": 5},
            "warmup_rounds is 5, but run.rounds is 5",
        ),
        (FedLora(drift=FedProx()), PRIVATE, "does not account for method.drift.name = fedprox"),
        (FedLora(keep_optimiser=True), PRIVATE, "does not account for method.keep_optimiser"),
        (FedLora(personal_head=True), PRIVATE, "does not account for method.personal_head"),
        (
            FedLora(logit_adjustment=OwnLabelSkew()),
            PRIVATE,
            "not account for method.logit_adjustment",
        ),
        (
            FedLora(logit_adjustment=OwnLabelSkew()),
            {"kind": "causal-lm"},
            "modelling has no classes",
        ),
        (FedLora(), {"held_out": 1.0}, "fleet.held_out"),
        (FedLora(), {"held_out": 0.1, "kind": "causal-lm"}, "and language modelling has none"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(method, settings, line):
    with pytest.raises(BadInput, match=line) as refused:
        Recipe(method=method, **settings)
    assert "\n" not in str(refused.value)


def test_rows_are_held_out_once_and_trained_by_nobody():
    shares = [np.arange(0, 20), np.arange(20, 23), np.arange(23, 24)]
    kept, held = held_out_of(shares, 0.25, np.random.default_rng(0))
    assert [len(rows) for rows in held] == [5, 1, 0]
    for share, one, other in zip(shares, kept, held, strict=True):
        assert np.array_equal(np.sort(np.concatenate([one, other])), share)


def test_a_run_scores_each_devices_own_head_on_its_own_rows(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    """Devices of one class each, which a head of its own knows at once."""
    command = functools.partial(in_process, monkeypatch, capsys)
    arguments = tiny_job(
        tiny_folder("bert"),
        write_csv(tmp_path / "rows.csv"),
        method__name="fedlora",
        method__rank=2,
        method__steps=10,
        method__learning_rate=0.02,
        method__personal_head="true",
        fleet__devices=2,
        fleet__partition="dominant:1.0",
        fleet__held_out=0.2,
    )
    at = next(i for i, word in enumerate(arguments) if word.startswith("method.ranks"))
    del arguments[at - 1 : at + 1]
    code, _, lines = command("run", *arguments, "--out", tmp_path / "run")
    assert code == 0, lines
    found = summary_of(tmp_path / "run")
    assert found["devices_own"] == 2 and found["accuracy_own"] == 1.0
    assert found["loss_own"] < found["loss_own_global"]
    code, out, _ = command("show", tmp_path / "run")
    assert code == 0 and "Own models" in out
