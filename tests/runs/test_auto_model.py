"""`task.model = "auto"`: MiniLM for texts, a fitting net for arrays, decided once and kept."""

import wave

import numpy as np
import pytest
from PIL import Image
from runs import write_csv

from fedspine.core.errors import BadInput
from fedspine.data import arrays
from fedspine.nets.choice import net_for
from fedspine.nets.load import load
from fedspine.nets.models import DESIGNS
from fedspine.runs import config, read_data
from fedspine.runs.assemble import assemble, settled
from fedspine.runs.loop import new_run, resume
from fedspine.runs.run_dir import make, recipe_of, summary_of
from fedspine.ui.progress import Silent

FLOATS, BYTES = np.dtype(np.float32), np.dtype(np.uint8)
SMALL = (
    "fleet.devices=2",
    "fleet.per_round=2",
    "method.name=fedavg",
    "method.steps=1",
    "method.batch=4",
    "run.rounds=1",
    "run.workers=1",
    "run.device=cpu",
)


def rows_like(shape, type, rows=20):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (rows, *shape)).astype(type), np.arange(rows) % 2


def npz(path, shape, type=FLOATS, rows=20):
    x, y = rows_like(shape, type, rows)
    np.savez(path, x=x, y=y)
    return path


class Saying(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.mark.parametrize(
    ("shape", "type", "net"),
    [
        ((9, 128), FLOATS, "cnn-h"),  # UCI-HAR
        ((561,), FLOATS, "cnn-h"),
        ((16000,), FLOATS, "cnn-s"),  # a second of speech
        ((2, 8000), FLOATS, "cnn-s"),
        ((28, 28), BYTES, "alexnet-small"),  # Fashion-MNIST
        ((28, 28), FLOATS, "alexnet-small"),  # the same, scaled by hand
        ((3, 32, 32), BYTES, "alexnet-small"),
        ((32, 32, 3), FLOATS, "alexnet-small"),
        ((32, 100), BYTES, "vgg-small"),  # a line of writing
        ((144, 144, 3), BYTES, "vgg-small"),
    ],
)
def test_the_net_follows_from_the_shape_and_reads_such_rows(shape, type, net) -> None:
    assert net_for(shape, bytes=type == BYTES) == net
    splits = (rows_like(shape, type, 2),) * 2
    found, train, _ = load(net, *splits, classes=2)
    # neither the features nor the weights outgrow what a small device can send
    sent = sum(tensor.numel() for tensor in found.start(np.random.default_rng(0)).values())
    assert len(train) == 2 and sent < 12e6


def test_no_net_is_chosen_that_refuses_the_rows() -> None:
    """Shapes with sides on either side of each limit are read by what is chosen, or refused."""
    sides = (1, 3, 4, 7, 8, 9, 33, 6847, 6848)
    shapes = [(a,) for a in sides] + [(a, b) for a in sides for b in sides]
    shapes += [(a, b, c) for a in (1, 3, 5, 9) for b in (7, 8, 9) for c in (1, 3, 4, 8)]
    chosen = set()
    for shape in shapes:
        for type in (FLOATS, BYTES):
            try:
                net = net_for(shape, bytes=type == BYTES)
            except BadInput:
                continue
            chosen.add(net)
            if np.prod(shape) < 1e6:  # a net of more is only large
                load(net, *((np.zeros((1, *shape), type), np.zeros(1, np.int64)),) * 2, classes=2)
    assert chosen == {"cnn-h", "cnn-s", "alexnet-small", "vgg-small"} < set(DESIGNS)


@pytest.mark.parametrize("type", [FLOATS, BYTES])
def test_shape_and_type_are_read_from_a_header(tmp_path, monkeypatch, type) -> None:
    npz(tmp_path / "train.npz", (9, 128), type)
    monkeypatch.setattr(arrays, "load", None)  # which would read all of it
    for place in (tmp_path, tmp_path / "train.npz"):
        assert arrays.row_of(str(place)) == ((9, 128), type)


def test_pictures_and_sounds_in_folders_of_classes_have_their_nets(tmp_path) -> None:
    for name in ("a", "b"):
        for split in ("train", "test"):
            for kind in ("pictures", "sounds"):
                (tmp_path / kind / split / name).mkdir(parents=True)
            Image.new("L", (40, 20)).save(tmp_path / "pictures" / split / name / "1.png")
            for i, samples in enumerate((100, 7000, 7000)):
                path = tmp_path / "sounds" / split / name / f"{i}.wav"
                with wave.open(str(path), "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    file.writeframes(bytes(2 * samples))
    for kind, net in (("pictures", "vgg-small"), ("sounds", "cnn-s")):
        recipe, line = read_data.modelled(config.load(None, [f"task.data={tmp_path / kind}"]))
        assert (recipe.task.model, recipe.task.kind) == (net, "array") and net in line
        shape, type = arrays.row_of(str(tmp_path / kind))
        read = arrays.load(str(tmp_path / kind)).train.x
        assert (shape, type) == (read.shape[1:], read.dtype)


def test_texts_are_read_by_minilm(tmp_path) -> None:
    recipe = config.load(None, [f"task.data={write_csv(tmp_path / 'rows.csv')}"])
    assert recipe.task.model == "auto" and ("task", "model") in recipe.open_choices
    chosen, lines = settled(recipe)
    assert (chosen.task.model, chosen.task.kind) == ("minilm", "classification")
    assert lines[0] == "model: minilm, for texts" and not chosen.open_choices
    assert config.load(None, ["fleet.devices=8"]).task.model == "minilm"  # the embedded job's own


def test_a_run_says_what_it_chose_keeps_it_and_is_resumed(tmp_path) -> None:
    data = npz(tmp_path / "x.npz", (9, 128))
    wanted, saying = config.load(None, [f"task.data={data}", *SMALL]), Saying()
    new_run(wanted, tmp_path / "run", saying)
    assert saying.lines[0] == "model: cnn-h, for rows of shape [9, 128]"
    kept = recipe_of(tmp_path / "run")
    assert (kept.task.model, kept.task.kind, kept.run.precision) == ("cnn-h", "array", "fp32")
    assert wanted.settled_as(kept).difference(kept) is None
    assert resume(tmp_path / "run", Silent(), wanted) == summary_of(tmp_path / "run")


def test_a_folder_that_a_sweep_made_is_settled_as_it_begins(tmp_path) -> None:
    data = npz(tmp_path / "x.npz", (9, 128))
    make(tmp_path / "cell", config.load(None, [f"task.data={data}", *SMALL]))
    assert recipe_of(tmp_path / "cell").task.model == "auto"
    assert resume(tmp_path / "cell", Silent())["model"] == "cnn-h"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["task.kind=causal-lm"], "name a decoder as task.model"),
        (["task.data=x.npz"], "method 'fedspine-plus' cannot train 'cnn-h', a net; choose one of"),
        (["task.data=x.npz", "task.kind=pair"], "arrays are read by a net, but task.kind is"),
        (["task.data=x.npz", "task.text=review"], "task.text is for texts, but arrays are"),
        (["task.kind=array"], "expected an .npz file"),
        (["task.data=odd.npz"], "no net reads rows of shape [2, 3, 5]"),
        (["task.data=broken.npz"], "cannot read"),
    ],
)
def test_what_cannot_be_chosen_is_one_clear_line(tmp_path, monkeypatch, settings, said) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "rows.csv")
    npz("x.npz", (9, 128))
    npz("odd.npz", (2, 3, 5))
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    with pytest.raises(BadInput) as error:
        assemble(settled(config.load(None, ["task.data=rows.csv", *settings]))[0])
    assert said in str(error.value) and "\n" not in str(error.value)
