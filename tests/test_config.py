"""Recipes: what is written is what is read, and when two describe the same results."""

from pathlib import Path

import pytest

from fedspine.core.errors import BadInput
from fedspine.methods import all_methods
from fedspine.methods.fedlora import FedLora
from fedspine.runs import config


@pytest.mark.parametrize("method", all_methods())
def test_a_recipe_survives_its_file(method, tmp_path) -> None:
    settings = [
        f"method.name={method}",
        "fleet.mix={tx2=2, nx=2}",
        "fleet.devices=4",
        "task.pair=second",
        "run.seed=3",
    ]
    recipe = config.load(None, settings)
    (tmp_path / "recipe.toml").write_text(recipe.toml())
    assert config.load(tmp_path / "recipe.toml") == recipe
    assert recipe.fleet.mix == {"tx2": 2, "nx": 2}
    assert recipe.task.kind == "pair"


def test_settings_are_laid_over_a_file_and_the_seed_over_both(tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text("[run]\nrounds = 7\nseed = 1\n[fleet]\ndevices = 9\n")
    recipe = config.load(
        tmp_path / "recipe.toml",
        ["run.seed=2", "fleet.devices = 5", "task.data=./my rows.csv"],
        seed=4,
    )
    assert (recipe.run.rounds, recipe.run.seed, recipe.fleet.devices) == (7, 4, 5)
    assert recipe.task.data == "./my rows.csv"


def test_another_method_leaves_out_what_it_does_not_have() -> None:
    assert config.load(None, ["method.name=fedlora"]).method.name == "fedlora"


def test_workers_make_no_difference_and_anything_else_does() -> None:
    recipe = config.load(None)
    other = config.load(None, ["run.workers=3"])
    assert recipe.difference(other) is None
    assert recipe.fingerprint == other.fingerprint
    other = config.load(None, ["method.steps=3"])
    assert recipe.difference(other) == f"method.steps is {recipe.method.steps} there, 3 here"
    assert recipe.fingerprint != other.fingerprint
    other = config.load(None, ["fleet.mix={tx2=80}"])
    assert recipe.difference(other) == "fleet.mix is None there, {'tx2': 80} here"


@pytest.mark.parametrize(
    "text", ["method = 3", "[task]\nmodel = 5", "[method]\nname = 5", "[[run]]\nrounds = 3"]
)
def test_wrong_types_in_a_file(text, tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(BadInput):
        config.load(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("run.precision=bf61", "bf16"),
        ("task.kind=pairs", "pair"),
        ("method.aggregation=zeropda", "zeropad"),
    ],
)
def test_a_choice_names_the_nearest(setting: str, near: str) -> None:
    with pytest.raises(BadInput, match=f"did you mean '{near}'"):
        config.load(None, [setting])


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    here = config.load(None, ["task.data=rows.csv"])
    assert here.task.data == str(tmp_path / "rows.csv")
    assert here.task.model == "auto"  # the embedded job's model was chosen for its own data
    assert config.load(None).task.model == "minilm"
    monkeypatch.chdir("/")
    assert config.load(None, [f"task.data={tmp_path / 'rows.csv'}"]).difference(here) is None


def test_the_embedded_jobs_rate_holds_for_its_own_data_and_method():
    own, default = config.load(None, []).method, FedLora()
    assert own.learning_rate != default.learning_rate
    for setting in ("task.data=other.csv", "method.name=fedlora"):
        other = config.load(None, [setting]).method
        assert other.learning_rate == default.learning_rate and other.steps == own.steps
        assert other.head_speed == default.head_speed
    given = config.load(None, ["task.data=other.csv", "method.learning_rate=0.001"]).method
    assert given.learning_rate == 0.001
