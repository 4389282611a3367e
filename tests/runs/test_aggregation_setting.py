"""`fleet.aggregation`: in recipes, with every method, at real sites by default, and in a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import in_process, tiny_job, write_csv

from fedspine.core.aggregation import CHOICES, Median, NormClip, TrimmedMean
from fedspine.core.errors import BadInput
from fedspine.methods import all_methods
from fedspine.runs import backend, config
from fedspine.runs.backend import RealSites
from fedspine.runs.config import Recipe

SPLIT = [name for name, cls in all_methods().items() if not cls.robust]


def test_methods_without_a_half_on_the_server_know_all_aggregations():
    robust = {name for name, cls in all_methods().items() if cls.robust}
    assert robust >= {"fedlora", "hetlora", "flexlora", "fedspine", "fedspine-plus", "fedavg"}
    assert robust >= {"loraprune", "magnitude", "prune_after", "linear_probe", "pyramidfl"}
    assert robust >= {"flora", "fedadapter", "legend", "fedquad", "fed-hello", "ffa-lora"}
    assert set(SPLIT) >= {"splitlora", "splitfed_v1", "splitfed_v2", "mergesfl", "adasfl"}


@pytest.mark.parametrize("name", SPLIT)
def test_the_others_refuse_all_but_the_mean(name):
    assert Recipe(method=name, aggregation="mean").fleet.aggregation is not None
    for how in set(CHOICES) - {"mean"}:
        with pytest.raises(
            BadInput, match=f"is {how}, but {name} supports .* choose one of .*fedavg, "
        ):
            Recipe(method=name, aggregation=how)


@pytest.mark.parametrize(
    "given", ["norm_clip", {"name": "norm_clip"}, NormClip()], ids=["name", "table", "part"]
)
def test_a_recipe_takes_a_name_a_table_or_a_part(given):
    assert Recipe(aggregation=given).fleet.aggregation == NormClip()
    assert Recipe(fleet={"aggregation": given}).fleet.aggregation == NormClip()


@pytest.mark.parametrize("how", [TrimmedMean(share=0.3), Median(), NormClip(bound=1.5)])
def test_a_recipe_that_was_written_out_is_the_same(how, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe(aggregation=how).toml())
    assert config.load(path).fleet.aggregation == how
    again = config.load(path, ["fleet.aggregation={name='norm_clip', bound=2.5}"])
    assert again.fleet.aggregation == NormClip(bound=2.5)
    assert config.load(path, ["fleet.aggregation=median"]).fleet.aggregation == Median()
    assert Recipe().fingerprint != config.load(path).fingerprint


def test_a_recipe_that_says_nothing_is_what_it_was():
    assert "aggregation" not in Recipe().table()["fleet"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"aggregation": "medium"}, "unknown fleet.aggregation.name 'medium'; did you mean"),
        ({"aggregation": 3}, "fleet.aggregation"),
        (
            {"aggregation": {"name": "norm_clip", "bound": 0.0}},
            "fleet.aggregation.bound is 0, but a multiple of the median norm above 0",
        ),
        (
            {"aggregation": {"name": "norm_clip", "bound": "x"}},
            "fleet.aggregation.bound is 'x'",
        ),
        (
            {"aggregation": "trimmed_mean", "per_round": 4},
            "needs 5 replies in a round, but there are 4",
        ),
        ({"aggregation": "trimmed_mean", "devices": 4}, "needs 5 replies"),
        (
            {"aggregation": "trimmed_mean", "per_round": 5, "quorum": 0.8},
            "needs 5 replies in a round, but there are 4",
        ),
        ({"aggregation": "median", "per_round": 2}, "needs 3 replies in a round"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(settings, line):
    with pytest.raises(BadInput, match=line) as refused:
        Recipe(method="fedlora", **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("how", "each"), [("median", 3), ("trimmed_mean", 5), ("multi_krum", 5), ("norm_clip", 2)]
)
def test_each_group_of_a_round_needs_enough_replies(how, each):
    made = Recipe(method="fedadapter", aggregation=how, devices=30, per_round=3 * each)
    assert made.fleet.aggregation == CHOICES[how]()
    line = (
        f"fedadapter divides the {3 * each - 1} replies of a round into up to 3 groups, and for "
        f"each of them fleet.aggregation is {how}.* needs {each} replies .* there "
    )
    with pytest.raises(BadInput, match=line):
        Recipe(method="fedadapter", aggregation=how, devices=30, per_round=3 * each - 1)


def real_sites(count):
    sites = RealSites(Path("kit"))
    sites._link = SimpleNamespace(sites=[f"site-{i}" for i in range(count)])
    return sites


def test_real_sites_bound_norms_by_default():
    adapted = real_sites(5).adapted(Recipe(method="fedlora"))
    assert adapted.fleet.aggregation == NormClip()
    for how in CHOICES:
        said = real_sites(5).adapted(Recipe(method="fedlora", aggregation=how))
        assert said.fleet.aggregation == CHOICES[how]()
    grouped = real_sites(6).adapted(Recipe(method="fedadapter"))
    assert grouped.fleet.aggregation == NormClip()


@pytest.mark.parametrize(("method", "sites"), [("splitlora", 5), ("fedlora", 1), ("fedadapter", 5)])
def test_where_norms_cannot_be_bounded_the_run_says_so(method, sites):
    adapted = real_sites(sites).adapted(Recipe(method=method))
    assert adapted.fleet.aggregation is None
    assert backend._aggregation_line(adapted) == (
        "aggregation: mean, so one bad site can spoil the model (docs/robustness.md)"
    )


def test_too_few_real_sites_are_refused():
    with pytest.raises(BadInput, match="median, which needs 3 replies .* there are 2"):
        real_sites(2).adapted(Recipe(method="fedlora", aggregation="median"))


def test_a_run_at_real_sites_goes_on_as_it_began():
    sites = real_sites(5)
    begun = sites.adapted(Recipe(method="fedlora"))
    assert begun.difference(sites.adapted(Recipe(method="fedlora"), begun=begun)) is None
    older = Recipe(method="fedlora", devices=5, per_round=5)  # before there was this setting
    assert sites.adapted(Recipe(method="fedlora"), begun=older).fleet.aggregation is None


@pytest.fixture
def job(tiny_folder, tmp_path):
    def arguments(**changed):
        settings = {"method__name": "fedlora", "method__ranks": None, "fleet__per_round": 3}
        made = tiny_job(tiny_folder("bert"), write_csv(tmp_path / "rows.csv"), **settings | changed)
        pairs = list(zip(made[::2], made[1::2], strict=True))
        return [part for pair in pairs if not pair[1].endswith("None") for part in pair]

    return arguments


def test_a_run_says_in_its_records_who_was_bounded(job, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    how = "{name='norm_clip', bound=0.5}"  # which the median device itself is above
    arguments = job(fleet__aggregation=how)
    code, _, err = in_process(monkeypatch, capsys, "run", *arguments, "--out", out)
    assert code == 0, err
    assert config.load(out / "recipe.toml").fleet.aggregation == NormClip(bound=0.5)
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    notes = [row["values"] for row in rows if row["row"] == "note" and "bounded" in row["values"]]
    assert {note["bounded"] for note in notes} == {"adapter", "head"}
    assert all(0 < note["share"] < 1 for note in notes)


def test_too_few_devices_end_a_command_with_one_line(job, tmp_path, monkeypatch, capsys):
    arguments = job(fleet__aggregation="trimmed_mean")
    code, _, err = in_process(monkeypatch, capsys, "run", *arguments, "--out", tmp_path / "run")
    assert code == 2
    assert len(err) == 1 and "needs 5 replies in a round, but there are 3" in err[0]
    assert not (tmp_path / "run").exists()
