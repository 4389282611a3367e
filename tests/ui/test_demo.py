"""`fedspine demo`: the whole path on one screen, on a tiny model here."""

from runs import in_process, summary_of, tiny_job, write_csv

from fedspine.runs import config
from fedspine.runs.loop import new_run
from fedspine.ui import demo
from fedspine.ui.device_scores import device_scores
from fedspine.ui.progress import Silent


def test_a_first_look_goes_from_data_to_an_answer(
    tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    job = tiny_job(tiny_folder("bert"), write_csv(tmp_path / "rows.csv"), run__evaluate_every=1)
    tables = config.load(None, job[1::2]).table()
    monkeypatch.setattr(demo, "embedded", lambda name: {"demo": tables}[name])
    code, out, lines = in_process(monkeypatch, capsys, "demo", "--out", tmp_path / "look")
    assert code == 0
    assert "round 1 " in out and "at the end" in out and "█" in out
    for text in demo.TEXTS:
        assert " ".join(text.split()[:2]) in out
    assert "kind" in out  # a class of the data, as the exported model answers
    assert summary_of(tmp_path / "look")["rounds"] == 2
    assert (tmp_path / "look" / "report.html").exists()
    assert list((tmp_path / "look" / "models").iterdir())
    assert any("about" in line and "left" in line for line in lines)
    assert "scored all 5 deployed models" in lines
    again, _, lines = in_process(monkeypatch, capsys, "demo", "--out", tmp_path / "look")
    assert again == 2 and len(lines) == 1 and "exists" in lines[0]


def test_the_recipe_of_the_first_look_is_small() -> None:
    recipe = config.recipe(config.embedded("demo"))
    assert recipe.method.name == "fedspine-plus" and recipe.task.data == "pydoc-topics"
    samples = recipe.run.rounds * recipe.fleet.per_round * recipe.method.steps * recipe.method.batch
    # half of MiniLM's blocks train 100 samples a second on two AVX2 cores of 48 GFLOP/s: half a
    # minute
    assert samples <= 3100 and recipe.run.final_rows <= 512


def test_show_all_scores_every_device_once(tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    """The mean over all devices of a run that scored all of them is the run's own."""
    job = tiny_job(tiny_folder("bert"), write_csv(tmp_path / "rows.csv"))
    summary = new_run(config.load(None, job[1::2]), tmp_path / "run", Silent())
    scores = device_scores(tmp_path / "run", Silent())
    assert summary["devices_scored"] == len(scores) == 3
    assert sum(each["accuracy"] for each in scores.values()) / 3 == summary["accuracy"]
    assert (tmp_path / "run" / "device_scores.json").exists()

    def never(*_, **__):
        raise AssertionError("scored again")

    monkeypatch.setattr("fedspine.ui.device_scores.score_models", never)
    code, out, _ = in_process(monkeypatch, capsys, "show", tmp_path / "run", "--all")
    assert code == 0 and "mean of 3 devices" in out
    for id, each in scores.items():
        assert id in out and f"{100 * each['accuracy']:.1f} %" in out


def test_a_sample_of_the_devices_is_said_to_be_one(tiny_folder, tmp_path) -> None:
    job = tiny_job(
        tiny_folder("bert"),
        write_csv(tmp_path / "rows.csv"),
        run__final_devices=2,
        run__final_rows=5,
    )
    summary = new_run(config.load(None, job[1::2]), tmp_path / "run", Silent())
    assert (summary["devices_scored"], summary["test_rows"]) == (2, 5)
    from fedspine.report.tables import headlines

    note = next(line.note for line in headlines(summary) if line.label == "Device models")
    assert note == "mean accuracy of 2 of 3 devices' models; all: fedspine show --all"
