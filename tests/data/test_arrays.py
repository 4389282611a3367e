"""Arrays as data: the files that are read, the refusals, and recipes that name arrays."""

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import DATA

from fedspine.core.errors import BadInput
from fedspine.data.arrays import is_arrays, load
from fedspine.methods import all_methods
from fedspine.runs import config
from fedspine.runs.assemble import assemble

ROWS = 20


def rows(count=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, 16)).astype(np.float32), np.arange(count) % 2


def npz(path, **arrays):
    """An `.npz` of good rows, with some arrays replaced, or left out by None."""
    x, y = rows()
    made = {"x": x, "y": y} | arrays
    np.savez(path, **{name: array for name, array in made.items() if array is not None})
    return str(path)


def sound(path, values, *, width=2, rate=8000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.tobytes())


# --- what is read ---


def test_one_file_is_split_into_train_and_test_rows(tmp_path):
    data = load(npz(tmp_path / "a.npz", label_names=np.array(["sit", "walk"])))
    assert (len(data.train), len(data.test)) == (16, 4)
    assert data.label_names == ("sit", "walk")
    x, y = rows()
    both = np.concatenate([data.train.x, data.test.x])
    assert sorted(map(bytes, both)) == sorted(map(bytes, x))
    where = [int(np.flatnonzero((x == row).all((1, 2)))[0]) for row in data.test.x]
    assert data.test.labels.tolist() == y[where].tolist()


def test_a_folder_names_its_splits_and_columns_go_by_name(tmp_path):
    x, y = rows(6, 1)
    npz(tmp_path / "train.npz", y=np.array([7, 9] * 10), subject=np.arange(ROWS))
    npz(tmp_path / "test.npz", x=x, y=y * 2 + 7, subject=np.arange(6))
    data = load(str(tmp_path), group="subject")
    assert (len(data.train), len(data.test)) == (ROWS, 6)
    assert data.label_names == ("7", "9") and data.test.labels.tolist() == y.tolist()
    assert data.train.columns["subject"][:3] == ("0", "1", "2")


def test_texts_are_labels_too(tmp_path):
    data = load(npz(tmp_path / "a.npz", y=np.array(["up", "down"] * 10)))
    assert data.label_names == ("down", "up")
    stated = load(
        npz(
            tmp_path / "b.npz",
            y=np.array(["up", "down"] * 10),
            label_names=np.array(["up", "down", "off"]),
        )
    )
    assert stated.label_names == ("up", "down", "off")


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64, np.int16])
def test_numbers_of_any_kind_are_read(tmp_path, dtype):
    x = (np.arange(ROWS * 12).reshape(ROWS, 3, 4) % 200).astype(dtype)
    data = load(npz(tmp_path / "a.npz", x=x))
    assert data.train.x.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    assert sorted(np.concatenate([data.train.x, data.test.x]).reshape(ROWS, -1)[:, 0]) == sorted(
        x[:, 0, 0]
    )


@pytest.mark.parametrize(
    ("mode", "suffix", "shape"), [("RGB", "png", (3, 9, 8)), ("L", "jpg", (1, 9, 8))]
)
def test_a_folder_of_pictures_per_class(tmp_path, mode, suffix, shape):
    for name, shade in (("day", 200), ("night", 30)):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new(mode, (8, 9), (shade,) * 3 if mode == "RGB" else shade).save(
                tmp_path / name / f"{i}.{suffix}"
            )
    (tmp_path / "notes.txt").write_text("made for a test")
    data = load(str(tmp_path))
    assert is_arrays(str(tmp_path))
    assert data.label_names == ("day", "night")
    assert data.train.x.shape == (8, *shape) and data.train.x.dtype == np.uint8
    assert abs(int(data.train.x[data.train.labels == 1].max()) - 30) <= 2  # JPEG is not exact


def test_one_picture_with_colour_makes_all_of_them_colour(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for i in range(5):
        Image.new("L", (8, 8), i).save(tmp_path / "a" / f"{i}.png")
        Image.new("RGBA", (8, 8), (i, 0, 9, 128)).save(tmp_path / "b" / f"{i}.png")
    assert load(str(tmp_path)).train.x.shape == (8, 3, 8, 8)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_sounds_are_brought_to_the_usual_length(tmp_path, width):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("no", "yes"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                values = np.full(
                    100 - 40 * (i == 3) + 20 * (i == 1 and split == "test"), 64, np.uint8
                )
                if width > 1:
                    values = values.astype(f"<i{width}") << (8 * width - 8)
                sound(tmp_path / split / name / f"{i}.wav", values, width=width)
    data = load(str(tmp_path))
    assert data.train.x.shape == (8, 1, 100) and data.test.x.shape == (4, 1, 100)
    short = data.train.x[3, 0]
    assert not short[60:].any() and np.allclose(short[:60], -0.5 if width == 1 else 0.5)


def test_a_folder_of_sensor_files_per_class(tmp_path):
    for name in ("sit", "walk"):
        (tmp_path / name).mkdir()
        for i in range(5):
            np.save(tmp_path / name / f"{i}.npy", np.full((3, 16), i, np.float64))
    assert load(str(tmp_path)).train.x.shape == (8, 3, 16)


# --- what is refused ---

NAN = rows()[0].copy()
NAN[[4, 7], 1, 2] = np.nan
BAD = {
    "no x": ({"x": None}, "expected an array 'x' in a.npz, found y"),
    "no y": ({"y": None}, "expected an array 'y' in a.npz, found x"),
    "objects": ({"y": np.array([1, "a"] * 10, object)}, "without object arrays"),
    "texts as x": ({"x": np.array(["a"] * ROWS)}, "got shape [20]"),
    "flat x": ({"x": np.zeros(ROWS)}, "1 to 3 dimensions per row"),
    "x of five": ({"x": np.zeros((ROWS, 1, 1, 1, 1))}, "got shape [20, 1, 1, 1, 1]"),
    "empty rows": ({"x": np.zeros((ROWS, 0))}, "none of them empty"),
    "no rows": ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "got shape [0, 3]"),
    "complex x": (
        {"x": np.zeros((ROWS, 3), complex)},
        "expected numbers in x of a.npz, got complex128",
    ),
    "nan": ({"x": NAN}, "2 rows hold NaN or infinity, the first is row 4"),
    "infinity": ({"x": np.where(np.isnan(NAN), np.inf, NAN)}, "the first is row 4"),
    "too large": ({"x": np.full((ROWS, 3), 1e300)}, "20 rows hold NaN or infinity"),
    "short y": ({"y": np.zeros(19, int)}, "as long as x, 20 rows, got shape [19]"),
    "one-hot y": (
        {"y": np.eye(ROWS, dtype=int)},
        "one label per row in y of a.npz, got shape [20, 20]",
    ),
    "floats as y": (
        {"y": np.arange(ROWS) / 2},
        "integers or strings as labels in y of a.npz, got 0.5",
    ),
    "negative y": ({"y": np.arange(ROWS) - 3}, "labels of at least 0 in y of a.npz, row 0 has -3"),
    "one class": ({"y": np.zeros(ROWS, int)}, "at least 2 classes in y of a.npz, found only 0"),
    "beyond the names": ({"y": np.arange(ROWS), "label_names": np.array(["a", "b"])}, "found 2"),
    "names of numbers": (
        {"label_names": np.array([1, 2])},
        "label_names of a.npz to be a list of distinct strings",
    ),
    "equal names": ({"label_names": np.array(["a", "a"])}, "a list of distinct strings"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_one_clear_line(tmp_path, case):
    arrays, said = BAD[case]
    with pytest.raises(BadInput) as error:
        load(npz(tmp_path / "a.npz", **arrays))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def other_shape(folder):
    npz(folder / "train.npz")
    npz(folder / "test.npz", x=np.zeros((ROWS, 3, 17), np.float32))


def other_type(folder):
    npz(folder / "train.npz")
    npz(folder / "test.npz", x=np.zeros((ROWS, 3, 16), np.uint8))


def other_classes(folder):
    npz(folder / "train.npz")
    npz(folder / "test.npz", y=np.arange(ROWS) % 3)


def no_training_rows(folder):
    npz(folder / "test.npz")
    npz(folder / "more.npz")


def pictures_of_two_sizes(folder):
    (folder / "a").mkdir()
    for side in (8, 9):
        Image.new("L", (side, 8)).save(folder / "a" / f"{side}.png")


def no_picture(folder):
    (folder / "a").mkdir()
    (folder / "a" / "x.png").write_bytes(b"GIF89a, or so it says")


def pictures_and_sounds(folder):
    (folder / "a").mkdir()
    Image.new("L", (8, 8)).save(folder / "a" / "x.png")
    sound(folder / "a" / "x.wav", np.zeros(9, np.int16))


def no_sound(folder):
    (folder / "a").mkdir()
    (folder / "a" / "x.wav").write_bytes(b"RIFF")


def sounds_of_two_rates(folder):
    (folder / "a").mkdir()
    for rate in (8000, 16000):
        sound(folder / "a" / f"{rate}.wav", np.zeros(9, np.int16), rate=rate)


def cut_off(folder):
    whole = Path(npz(folder / "train.npz")).read_bytes()
    (folder / "train.npz").write_bytes(whole[: len(whole) // 2])


def nothing(folder):
    (folder / "readme.txt").write_text("empty")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_shape, "rows of [3, 16] float32, got [3, 17] float32"),
        (other_type, "got [3, 16] uint8"),
        (other_classes, "in y of test.npz (0, 1), found 2"),
        (no_training_rows, "expected train.npz in the folder"),
        (pictures_of_two_sizes, "convert them to one size"),
        (no_picture, "as an image"),
        (pictures_and_sounds, "found .png, .wav; keep one format"),
        (no_sound, "as audio"),
        (sounds_of_two_rates, "one sampling rate, got 16000"),
        (cut_off, "as arrays"),
        (nothing, "found none; keep one format, or name an .npz file"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(BadInput) as error:
        load(str(tmp_path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_single_array_or_no_array_file_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npy").read_bytes())
    for name, said in (
        ("a.npy", "an .npz file or a folder"),
        ("b.npz", "found one"),
        ("c.npz", "found nothing there"),
    ):
        with pytest.raises(BadInput, match=said):
            load(str(tmp_path / name))
    with pytest.raises(BadInput, match="an array 'who' in d.npz, found x, y"):
        load(npz(tmp_path / "d.npz"), group="who")


# --- recipes ---


def recipe(data, *settings):
    return config.load(
        None,
        [
            "task.model=cnn-h",
            f"task.data={data}",
            "fleet.devices=4",
            "method.name=fedavg",
            *settings,
        ],
    )


def test_a_net_makes_the_kind_array_and_the_recipe_survives_its_file(tmp_path):
    made = recipe(npz(tmp_path / "a.npz"))
    assert made.task.kind == "array"
    (tmp_path / "recipe.toml").write_text(made.toml())
    assert config.load(tmp_path / "recipe.toml") == made


def test_a_recipe_of_arrays_is_built(tmp_path):
    assembled = assemble(recipe(npz(tmp_path / "a.npz"), "fleet.partition=p:4", "run.device=cpu"))
    assert assembled.task.train.x.shape == (16, 3, 16) and assembled.task.label_names == ("0", "1")
    assert sorted(np.concatenate(assembled.shares).tolist()) == list(range(16))
    by_group = npz(tmp_path / "b.npz", who=np.arange(ROWS) % 4)
    shares = assemble(recipe(by_group, "fleet.partition=column:who", "run.device=cpu")).shares
    assert [len(share) for share in shares] and len(shares) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["task.kind=classification"],
            "'cnn-h' is a net for arrays, but task.kind is 'classification'",
        ),
        (["task.pair=second"], "task.pair is for texts"),
        (["task.text=review"], "task.text is for texts"),
        (["task.layers=2"], "task.layers is for texts"),
        (
            ["task.model=minilm", "task.kind=array"],
            "which 'minilm' cannot read; set task.model to one of alexnet",
        ),
        (["task.model=minilm"], "holds arrays, which 'minilm' cannot read"),
        (["task.model=alexnet"], "alexnet needs at least 8 pixels each way"),
        (["task.data=pydoc-topics"], "'pydoc-topics' is text, but a net reads arrays"),
        (["fleet.partition=column:who"], "an array 'who'"),
        (["fleet.partition=natural"], "names its devices"),
        (["fleet.devices=17"], "1 to 16 devices"),
    ],
)
def test_a_recipe_that_cannot_work_is_one_clear_line(tmp_path, settings, said):
    with pytest.raises(BadInput) as error:
        assemble(recipe(npz(tmp_path / "a.npz"), *settings))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [name for name, cls in all_methods().items() if "net" not in cls.models]
)
def test_a_method_for_transformers_refuses_a_net_at_once(tmp_path, name):
    with pytest.raises(
        BadInput, match=f"method '{name}' cannot train 'cnn-h', a net; choose one of .*fedavg"
    ):
        assemble(recipe(tmp_path / "never-read.npz", f"method.name={name}"))


@pytest.mark.parametrize(
    ("net", "name", "shape", "classes"),
    [
        ("cnn-h", "uci_har", (7352, 9, 128), 6),
        ("alexnet-small", "fashion_mnist", (30000, 1, 28, 28), 10),
    ],
)
def test_real_arrays_are_read(net, name, shape, classes):
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not beside the repository, in shared/data")
    task = assemble(recipe(DATA / name, f"task.model={net}", "run.device=cpu")).task
    assert task.train.x.shape == shape and len(task.label_names) == classes


def test_rows_without_a_label_are_left_out_and_counted(tmp_path):
    """NaN among whole floats, as tools write them for missing values, and empty texts."""
    x = np.arange(24 * 16, dtype=np.float32).reshape(24, 2, 8)
    for name, y in (("f", [1.0, 2.0, np.nan]), ("u", ["1", " 2", ""])):
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.array(y * 8), by=np.arange(24))
        data = load(str(tmp_path / f"{name}.npz"), group="by")
        assert data.label_names == ("1", "2") and data.left_out == {"no label": 8}
        assert (len(data.train), len(data.test)) == (13, 3)
        kept = [int(row) for row in data.train.columns["by"]]
        assert data.train.labels.tolist() == [row % 3 for row in kept]
        assert (data.train.x == x[kept]).all()


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.arange(24), "each of the 24 rows has its own label; give class labels"),
        (np.arange(24) / 2, "expected integers or strings as labels in y of d.npz, got 0.5"),
        (np.full(24, np.nan), "expected labels in y of d.npz, found none"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, y, said):
    np.savez(tmp_path / "d.npz", x=np.zeros((24, 2, 8), np.float32), y=y)
    with pytest.raises(BadInput, match=said):
        load(str(tmp_path / "d.npz"))
