"""Data sets as a folder with one sub-folder per class, of images, arrays or audio clips.

`cat/1.png dog/2.png`, or the same below `train/` and `test/`. Images are PNG or JPEG, arrays
`.npy`, audio clips `.wav`.
"""

import wave
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fedspine.core.errors import BadInput, reason_of
from fedspine.data.files import SPLITS

WIDTHS = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}  # bytes of an audio sample


def is_one(folder: Path) -> bool:
    """Whether there are readable files one level down, or two levels down below a split."""
    return any(
        _files(sub) or any(_files(deeper) for deeper in _folders(sub)) for sub in _folders(folder)
    )


def read(folder: Path) -> Iterator[tuple[str, Path, np.ndarray, np.ndarray]]:
    """Each split's name and folder, its rows [rows, ...] and the names of their classes [rows].

    All files have one format. Images and arrays must have one size; audio clips are cut, or padded
    with silence at the end, to the most common length of the training clips. Raises BadInput for
    files that cannot be read or do not fit together.
    """
    splits, length = _splits(folder), None
    for split in sorted(splits, key=lambda name: name != "train"):
        files = [(file, sub.name) for sub in _folders(splits[split]) for file in _files(sub)]
        reader = _reader(splits[split], [file for file, _ in files])
        rows = (
            _images([file for file, _ in files])
            if reader is _image
            else [reader(file) for file, _ in files]
        )
        if reader is _audio:
            _one_rate([file for file, _ in files])
            length = length or Counter(row.shape[-1] for row in rows).most_common(1)[0][0]
            rows = [_fitted(row, length) for row in rows]
        _alike(rows, [file for file, _ in files])
        yield split, splits[split], np.stack(rows), np.array([name for _, name in files])


def row_of(folder: Path) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and dtype of the first training row, an audio clip at the most common length.

    None without training rows. Raises BadInput for a row that cannot be read.
    """
    files = [file for sub in _folders(_splits(folder)["train"]) for file in _files(sub)]
    if not files:
        return None
    row = READERS[files[0].suffix.lower()](files[0])
    if files[0].suffix.lower() == ".wav":
        row = _fitted(row, Counter(map(_samples, files)).most_common(1)[0][0])
    return row.shape, row.dtype


def _samples(path: Path) -> int | None:
    """The number of samples of an audio clip, None for a file that is not one."""
    try:
        with wave.open(str(path), "rb") as file:
            return file.getnframes()
    except (OSError, EOFError, wave.Error):
        return None


def _splits(folder: Path) -> dict[str, Path]:
    """The folder of each split; without folders named after splits, all of it is for training."""
    splits = {
        SPLITS[sub.name.lower()]: sub for sub in _folders(folder) if sub.name.lower() in SPLITS
    }
    return splits if "train" in splits else {"train": folder}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.glob("[!.]*") if path.is_file() and path.suffix.lower() in READERS
    )


def _reader(folder: Path, files: list[Path]) -> Callable[[Path], np.ndarray]:
    found = {READERS[file.suffix.lower()] for file in files}
    if len(found) != 1:
        kinds = ", ".join(sorted({file.suffix.lower() for file in files})) or "none"
        raise BadInput(
            f"expected files of one format ({', '.join(READERS)}) in a sub-folder per class of "
            f"{str(folder)!r}, found {kinds}; keep one format, or name an .npz file"
        )
    return found.pop()


def _alike(rows: list[np.ndarray], files: list[Path]) -> None:
    for row, file in zip(rows, files, strict=True):
        if row.shape != rows[0].shape or row.dtype != rows[0].dtype:
            raise BadInput(
                f"expected all rows to be like {files[0]}, {list(rows[0].shape)} {rows[0].dtype}, "
                f"got {list(row.shape)} {row.dtype} in {file}; convert them to one size and type"
            )


# --- formats ---


def _images(paths: list[Path]) -> list[np.ndarray]:
    """Images with one channel each if none has colour, else with three."""
    read = [_image(path) for path in paths]
    if all(len(image) == 1 for image in read):
        return read
    return [np.broadcast_to(image, (3, *image.shape[1:])) for image in read]


def _image(path: Path) -> np.ndarray:
    """uint8 [3, height, width] in colour, or [1, height, width]; transparency is dropped."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            grey = image.mode in GREY
            values = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(
            f"cannot read {str(path)!r} as an image: {reason_of(error)}; repair or remove it"
        ) from error
    return values[None] if grey else values.transpose(2, 0, 1)


def _array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(
            f"cannot read {str(path)!r} as an array: {reason_of(error)}; repair or remove it"
        ) from error
    return found


def _audio(path: Path) -> np.ndarray:
    """float32 [channels, samples], from -1 to 1."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            frames = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BadInput(
            f"cannot read {str(path)!r} as audio: {reason_of(error)}; repair or remove it"
        ) from error
    if width not in WIDTHS:
        raise BadInput(
            f"expected 8, 16 or 32 bits per sample, got {8 * width} in {path}; convert to 16 bits"
        )
    values = np.frombuffer(frames, WIDTHS[width]).astype(np.float32)
    middle, largest = (128, 128) if width == 1 else (0, 2 ** (8 * width - 1))
    return ((values - middle) / largest).reshape(-1, channels).T


def _one_rate(paths: list[Path]) -> None:
    rates = {}
    for path in paths:
        with wave.open(str(path), "rb") as file:
            rates.setdefault(file.getframerate(), path)
    if len(rates) > 1:
        found = ", ".join(f"{rate} in {path}" for rate, path in list(rates.items())[:2])
        raise BadInput(f"expected audio with one sampling rate, got {found}; convert it to one")


def _fitted(clip: np.ndarray, length: int) -> np.ndarray:
    """The clip cut, or padded with silence, to `length` samples."""
    return np.pad(clip[:, :length], ((0, 0), (0, max(0, length - clip.shape[1]))))


GREY = ("1", "L", "LA")  # modes of images without colour
READERS: dict[str, Callable[[Path], np.ndarray]] = {
    ".png": _image,
    ".jpg": _image,
    ".jpeg": _image,
    ".npy": _array,
    ".wav": _audio,
}
