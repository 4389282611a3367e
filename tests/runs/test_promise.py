"""`[privacy]` of a recipe: what is refused, what a run promises, and what its summary says."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from runs import carried_out, in_process, records_of, summary_of, tiny_job, without_wall, write_csv

from fedspine.core.errors import BadInput
from fedspine.runs.assemble import cohort
from fedspine.runs.config import Recipe, recipe
from fedspine.runs.promise import check_delta, privacy_of

PROMISE = {"epsilon": 8.0, "delta": 1e-4}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epsilon": 8}, "privacy.epsilon is 8.0 and privacy.delta is missing; give a delta"),
        ({"delta": 1e-5}, "privacy.epsilon is missing; give the epsilon"),
        ({"epsilon": 0, "delta": 1e-5}, "privacy.epsilon is 0: Input should be greater than 0"),
        ({"epsilon": -1.0, "delta": 1e-5}, "privacy.epsilon is -1.0"),
        ({"epsilon": "many", "delta": 1e-5}, "privacy.epsilon is 'many': Input should be a valid"),
        ({"epsilon": float("nan"), "delta": 1e-5}, "privacy.epsilon is nan"),
        ({"epsilon": 1.0, "delta": 0.0}, "privacy.delta is 0.0"),
        ({"epsilon": 1.0, "delta": 1.0}, "privacy.delta is 1.0"),
        (PROMISE | {"clip": 0.0}, "privacy.clip is 0.0: Input should be greater than 0"),
        (PROMISE | {"clip": -1.0}, "privacy.clip is -1.0"),
        (PROMISE | {"level": "row"}, "unknown privacy.level 'row'; did you mean 'rows'?"),
        (PROMISE | {"epsilom": 1}, "unknown key of [privacy] 'epsilom'; did you mean 'epsilon'?"),
    ],
)
def test_a_promise_that_cannot_be_is_one_line(given, said):
    with pytest.raises(BadInput) as error:
        recipe({"method": {"name": "fedlora"}, "privacy": given})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_method_that_cannot_keep_it_is_refused_with_those_that_can():
    with pytest.raises(BadInput) as error:
        Recipe(method="fedspine-plus", **PROMISE)
    assert "method 'fedspine-plus' does not support [privacy]" in str(error.value)
    assert "choose one of fedlora, ffa-lora, linear_probe" in str(error.value)


def test_a_recipe_without_a_promise_is_as_before_and_one_with_it_comes_back():
    assert "privacy" not in Recipe(method="fedlora").table()
    assert privacy_of(Recipe(method="fedlora")) is None
    for epsilon, finite in ((3, 3.0), ("inf", None)):
        made = Recipe(method="ffa-lora", **PROMISE | {"epsilon": epsilon})
        again = recipe(json.loads(json.dumps(made.table())))
        assert again == made and again.fingerprint == made.fingerprint
        assert privacy_of(made).epsilon == finite


def test_noise_of_real_sites_can_be_simulated(tmp_path, tiny_folder):
    data, found = tmp_path / "rows.csv", {}
    write_csv(data)
    for name, noise in (
        ("none", {}),
        ("some", {"fleet__noise": 4.0}),
        ("again", {"fleet__noise": 4.0}),
    ):
        folder = tmp_path / name
        job = tiny_job(tiny_folder("bert"), data, run__rounds=1, **noise)
        carried_out("run", *job, "--out", folder)
        asked = [row for row in records_of(folder) if row["row"] == "exchange"]
        found[name] = summary_of(folder)["state_sha256"], [row.get("noise") for row in asked]
    assert found["some"] == found["again"]
    assert found["none"][0] != found["some"][0]
    assert set(found["none"][1]) == {None} and all(found["some"][1])


@given(devices=some.integers(1, 30), per_round=some.integers(1, 40), rounds=some.integers(1, 40))
def test_the_budget_is_laid_out_for_the_device_asked_most_often(devices, per_round, rounds):
    made = Recipe(method="fedlora", devices=devices, per_round=per_round, rounds=rounds, **PROMISE)
    asked = np.zeros(devices, int)
    for round in range(rounds):
        asked[cohort(made, round)] += 1
    assert privacy_of(made).answers == asked.max()


def test_a_delta_of_one_over_the_rows_or_devices_is_refused():
    made = Recipe(method="fedlora", **PROMISE)
    check_delta(made, [9_999, 5])
    with pytest.raises(BadInput, match=r"delta is 0.0001, but a device holds 10000 rows.*0.0001"):
        check_delta(made, [5, 10_000])
    with pytest.raises(BadInput, match="the fleet has 80 devices"):
        check_delta(Recipe(method="fedlora", level="devices", epsilon=8, delta=0.0125), [10**6])
    check_delta(Recipe(method="fedlora"), [10**6])


# --- whole runs ---


@pytest.fixture
def command(monkeypatch, capsys):
    return functools.partial(in_process, monkeypatch, capsys)


@pytest.fixture
def job(tiny_folder, tmp_path):
    """Arguments of a tiny private run."""
    private = {
        "method__name": "fedlora",
        "method__head_start": "random",  # that of the embedded job
        "privacy__epsilon": 8,
        "privacy__delta": 1e-3,
    }
    data = write_csv(tmp_path / "rows.csv")

    def make(**changed):
        parts = tiny_job(tiny_folder("bert"), data, **private | changed)
        ranks = next(i for i, part in enumerate(parts) if part.startswith("method.ranks"))
        return parts[: ranks - 1] + parts[ranks + 1 :]  # FedLoRA has one rank

    return make


def test_records_and_summary_say_what_was_spent(job, command, tmp_path):
    code, _, lines = command("run", *job(run__rounds=3), "--out", tmp_path / "run", "--json")
    assert (code, lines) == (0, [])
    summary = summary_of(tmp_path / "run")["privacy"]
    spent = summary.pop("epsilon_spent")
    assert summary == {"level": "rows", "epsilon": 8.0, "delta": 1e-3, "clip": 1.0}
    exchanges = [row for row in records_of(tmp_path / "run") if row["row"] == "exchange"]
    assert spent == {row["device"]: row["epsilon"] for row in exchanges}
    assert len(spent) == 3 and all(0 < epsilon <= 8.0 for epsilon in spent.values())
    notes = [row["values"] for row in records_of(tmp_path / "run") if row["row"] == "note"]
    assert notes and all(note["loss"] is None for note in notes)
    _, shown, _ = command("show", tmp_path / "run")
    (line,) = [line for line in shown.splitlines() if line.startswith("privacy of rows")]
    assert "epsilon 8 at delta 0.001 promised to each device" in line
    assert all(f"{device} {epsilon:.3g}" in line for device, epsilon in spent.items())


def test_a_private_run_can_be_repeated(job, command, tmp_path):
    for name in ("one", "two"):
        code, _, _ = command("run", *job(), "--out", tmp_path / name, "--json")
        assert code == 0
    one, two = (without_wall(summary_of(tmp_path / name)) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method__head_start": "class-means"}, "class means of rows have no noise"),
        ({"privacy__delta": 0.1}, "set it well below"),
    ],
)
def test_a_run_that_would_break_its_promise_is_refused(job, command, tmp_path, changed, said):
    code, out, lines = command("run", *job(**changed), "--out", tmp_path / "run")
    assert code == 2 and out == ""
    (line,) = lines
    assert said in line
    assert not (tmp_path / "run").exists()


def test_without_the_accountant_a_run_says_what_to_install(job, command, tmp_path, monkeypatch):
    from fedspine.core import accountant

    monkeypatch.setattr(accountant.importlib.util, "find_spec", lambda name: None)
    code, _, lines = command("run", *job(), "--out", tmp_path / "run")
    assert (code, len(lines)) == (2, 1)
    assert "pip install 'fedspine[privacy]'" in lines[0]
