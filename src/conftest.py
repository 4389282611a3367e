"""What examples in docstrings find in their working directory: a tiny model, rows, and a run."""

import pytest


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """A folder with `tiny`, `rows.csv` and the finished run `runs/fedlora-1`."""
    import os
    import random

    from fedspine import FedLora, Recipe, run
    from fedspine.lm.tiny import write_tiny

    folder = tmp_path_factory.mktemp("examples")
    write_tiny(folder / "tiny", "bert")
    words = {"kind": ("good", "very"), "unkind": ("bad", "not")}
    rng = random.Random(0)
    texts = [f"the {rng.choice(words[label])} cab in dig,{label}" for label in [*words] * 40]
    (folder / "rows.csv").write_text("\n".join(["text,label", *texts]) + "\n")
    before = os.getcwd()
    os.chdir(folder)
    try:
        job = {"data": "rows.csv", "model": "tiny", "devices": 3, "per_round": 2, "rounds": 2}
        run(
            Recipe(
                method=FedLora(rank=4, steps=2),
                mix={"tx2": 1, "nx": 1, "agx": 1},
                evaluate_every=1,
                references=False,
                **job,
            )
        )
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def examples(request, monkeypatch):
    """Examples of the Python face start in that folder."""
    if request.node.name.startswith("fedspine.ui.python"):
        monkeypatch.chdir(request.getfixturevalue("ground"))
