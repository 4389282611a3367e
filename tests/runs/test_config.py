"""Recipes: what is written is what is read, and when two describe the same results."""

from pathlib import Path

import pytest

from fedspine.control.controllers import Deadline, Oracle, SUcb
from fedspine.core.errors import BadInput
from fedspine.lm.importance_sources import Blend, Gradient, Magnitude
from fedspine.methods import all_methods
from fedspine.methods.fedlora import FedLora
from fedspine.runs import config
from fedspine.runs.recipe_format import state_is_read


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


def test_the_embedded_jobs_rate_holds_for_its_own_data_and_method(monkeypatch):
    job = config.embedded()
    tuned = job | {"method": job["method"] | {"learning_rate": 5e-3}}  # by chance it is the default
    monkeypatch.setattr(config, "embedded", lambda name="default": tuned)
    own, default = config.load(None, []).method, FedLora()
    assert own.learning_rate == 5e-3 != default.learning_rate
    for setting in ("task.data=other.csv", "method.name=fedlora"):
        other = config.load(None, [setting]).method
        assert other.learning_rate == default.learning_rate and other.steps == own.steps
        assert other.head_lr_multiplier == default.head_lr_multiplier
    given = config.load(None, ["task.data=other.csv", "method.learning_rate=0.001"]).method
    assert given.learning_rate == 0.001


def test_embedded_recipes_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = config.load(Path("chat"), ["run.rounds=2"], seed=3)
    assert (chat.task.data, chat.task.model, chat.task.kind) == ("pydoc-qa", "smollm2", "causal-lm")
    assert (chat.run.rounds, chat.run.seed) == (2, 3) and chat.run.answers
    other = config.load(Path("chat"), ["task.data=other.jsonl", "method.name=fedlora"])
    assert other.task.model == "smollm2" and other.method.learning_rate == FedLora().learning_rate
    for name in config.EMBEDDED:
        assert config.load(Path(name)).table() == config.recipe(config.embedded(name)).table()
    with pytest.raises(BadInput, match=r"embedded recipe \(chat, default, demo\), or none"):
        config.load(Path("chatt"))
    Path("demo").mkdir()  # a folder is no recipe
    assert config.load(Path("demo")).table() == config.recipe(config.embedded("demo")).table()
    Path("chat").write_text('[task]\ndata = "mine.csv"\n')
    assert config.load(Path("chat")).task.data == "mine.csv"  # a file of the name goes before


# --- settings that are tables of their own ---


@pytest.mark.parametrize(
    ("settings", "controller"),
    [
        ([], Deadline()),
        (["method.controller.latency_margin=1.0"], Deadline(latency_margin=1.0)),
        (["method.controller.name=oracle"], Oracle()),
        (
            ["method.controller.deadline_slack=0.5", "method.controller.name=oracle"],
            Oracle(deadline_slack=0.5),
        ),
        (["method.name=fedspine"], SUcb()),
        (["method.name=fedspine", "method.controller.name=deadline"], Deadline()),
    ],
)
def test_a_part_is_set_by_its_name_and_its_settings(settings, controller) -> None:
    assert config.load(None, settings).method.controller == controller


def test_a_part_keeps_what_the_file_says_unless_another_is_named(tmp_path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[method]\nname = "fedspine"\n[method.importance]\nname = "blend"\nkeep = 0.5\n'
        "[method.controller]\nmax_tree_depth = 3\n"
    )
    read = config.load(file).method
    assert (read.importance, read.controller) == (Blend(keep=0.5), SUcb(max_tree_depth=3))
    read = config.load(file, ["method.importance.every=2"]).method
    assert read.importance == Blend(every=2, keep=0.5)
    read = config.load(file, ["method.importance.name=magnitude"]).method
    assert (read.importance, read.controller) == (Magnitude(), SUcb(max_tree_depth=3))


def test_another_method_takes_the_settings_that_its_own_part_has() -> None:
    """The embedded job says how often importance is updated, which is not its source's alone."""
    assert config.load(None).method.importance == Blend(every=2, keep=0.5)
    for name in ("fedspine", "loraprune", "prune_after"):
        assert config.load(None, [f"method.name={name}"]).method.importance == Gradient(
            every=2, keep=0.5
        )


def test_recipes_differ_by_the_setting_of_a_part() -> None:
    other = config.load(None, ["method.controller.latency_margin=1.0"])
    difference = config.load(None).difference(other)
    assert difference == "method.controller.latency_margin is 0.3 there, 1.0 here"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["method.controller.name=dedline"], "did you mean 'deadline'?"),
        (["method.controller.latency_margn=1"], "did you mean 'latency_margin'?"),
        (["method.controller.name=oracle", "method.controller.rank=4"], "for oracle 'rank'"),
        (["method.controller=deadline"], 'write controller = {name = "deadline"}'),
        (["method.controller.latency_margin=x"], "method.controller.latency_margin is 'x'"),
        (["method.controller.name=3"], "unknown method.controller.name '3'"),
        (["method.name=prune_after", "method.importance.name=blend"], "known: gradient, magnitude"),
    ],
)
def test_a_part_that_cannot_be_is_refused(settings, says) -> None:
    with pytest.raises(BadInput) as refused:
        config.load(None, settings)
    assert says in str(refused.value)


# --- the format ---


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("choice=bandit", 'write controller.name; for its earlier form write name = "f'),
        ("caution=0.3", "write controller.latency_margin"),
        ("score_every=2", "write importance.every"),
        ("head_speed=3.0", "write head_lr_multiplier"),
        (
            "fleet_say=0.5",
            'write name = "fedspine-plus" and global_importance_weight for fleet_say',
        ),
        ("enough=0.7", "method.enough is no longer a setting of methods; write fleet.quorum"),
        ("quorum=0.7", "method.quorum is no longer a setting of methods; write fleet.quorum"),
        ("pooled=1.0", "method.pooled is no longer a setting of methods; leave it out"),
        ("importance=blend", 'it is a table now; write importance = {name = "blend"}'),
    ],
)
def test_the_refusal_of_an_older_recipe_says_what_to_write_now(key, says) -> None:
    with pytest.raises(BadInput) as refused:
        config.load(None, ["method.name=fedspine", f"method.{key}"])
    assert says in str(refused.value)


def test_the_embedded_quorum_is_that_of_its_own_method() -> None:
    assert config.load(None).fleet.quorum == 0.7
    for other in ("fedlora", "mergesfl"):  # which waited for all, and cannot merge late replies
        assert config.load(None, [f"method.name={other}"]).fleet.quorum == 1
    said = config.load(None, ["method.name=fedlora", "fleet.quorum=0.5"])
    assert said.fleet.quorum == 0.5


def test_a_quorum_does_not_go_with_delays_that_it_would_not_wait_for() -> None:
    with pytest.raises(BadInput, match="fleet.quorum is 0.7, but fleet.delay_seconds delays only"):
        config.load(None, ["fleet.delay_seconds=1.0"])


@pytest.mark.parametrize("number", [0, 5, "4"])
def test_a_recipe_of_an_unknown_format_is_refused(number) -> None:
    with pytest.raises(BadInput, match="format is .*, but this fedspine reads recipes of format 4"):
        config.recipe({"format": number})


@pytest.mark.parametrize(
    ("format", "method", "read"),
    [
        (2, "fedlora", False),
        (3, "fedlora", True),
        (3, "splitfed_v2", True),
        (3, "mergesfl", False),
        (3, "pyramidfl", False),
        (4, "mergesfl", True),
    ],
)
def test_runs_are_read_where_their_methods_settings_are_the_same(format, method, read) -> None:
    assert state_is_read({"format": format, "method": {"name": method}}) == read
