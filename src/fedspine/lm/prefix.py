"""The activations that enter the lowest trained block: computed once for each row of a device, then
reused.

They depend on the frozen base, the structure below and the text only. So they are computed for all
of a device's rows in batches that are always the same, whichever rows an ask trains on: a stored
activation has the very bytes of a new one, and whether something is stored never changes a result.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedspine.core.task import Examples
from fedspine.core.tensors import moved
from fedspine.lm.base import Base, Model
from fedspine.lm.lora import a_name
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import Structure, key_of

BATCH = 32  # rows of one forward pass
MOST_BYTES = 8 << 30  # on disk
RESERVE = 1 << 30  # bytes of the disk left free, for the run's own state among others


class Prefixes:
    """Activations on disk, in the page cache while there is room; the oldest are evicted for new
    ones.

    Processes may share the folder. A full disk only costs time.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most = folder, most_bytes

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """What is stored as `key`, memory-mapped; else what `make` returns, which is stored where
        it can be.
        """
        path = self._folder / f"{key}.npy"
        with suppress(OSError, ValueError, EOFError):
            # "c": never written back, but torch wants it writable
            return _as_tensor(np.load(path, mmap_mode="c"))
        made = make()
        with suppress(OSError):
            self._store(path, _as_array(made))
        return made

    def _store(self, path: Path, array: np.ndarray) -> None:
        if array.nbytes > self._most:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._folder).free < array.nbytes + RESERVE:
            return
        self._make_room(array.nbytes)
        partial = path.with_suffix(f".{os.getpid()}.part")
        try:
            with open(partial, "wb") as file:
                np.save(file, array)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> None:
        there = sorted(
            (entry.stat().st_mtime_ns, entry.stat().st_size, entry.path)
            for entry in os.scandir(self._folder)
        )
        excess = sum(size for _, size, _ in there) + needed - self._most
        for _, size, path in there:
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size


def storable(base: Base, data: Examples, most_bytes: int | None = None) -> bool:
    """Whether the activations of all of `data` fit within the limit, so that none is evicted before
    its use.
    """
    return len(data.ids) * base.layout.width * base.precision.itemsize <= (most_bytes or MOST_BYTES)


def first_block(layout: PrunableLayout, model: Model) -> int:
    """The lowest block with an adapter, the number of blocks where there is none."""
    return min(
        (site.layer for site in layout.sites if a_name(site.path) in model.adapter),
        default=layout.layers,
    )


def name_of(device: str, first: int, structure: Structure) -> str:
    """The name of a device's activations below block `first` of this structure."""
    return f"{device}-{first}-{hashlib.sha256(key_of(structure, first)).hexdigest()[:16]}"


def activations(
    base: Base, model: Model, data: Examples, first: int
) -> Float[Tensor, "tokens width"]:
    """What enters block `first` for every token of `data`, in the order of its flat arrays, on the
    base's device.
    """
    base.fit(model.to(base.device))
    out = torch.empty(len(data.ids), base.layout.width, dtype=base.precision, device=base.device)
    for rows in data.batches_by_length(BATCH):
        index, inside = data.places(rows, data.width(rows))
        inputs = moved(data.batch(rows), base.device)
        del inputs["labels"]
        hidden = base.below(first, inputs)
        kept = torch.from_numpy(inside).to(base.device)
        out[torch.from_numpy(index[inside]).to(base.device)] = hidden[kept]
    return out


def entering(
    base: Base,
    data: Examples,
    stored: Float[Tensor, "tokens hidden"],
    rows: np.ndarray,
    width: int,
) -> Float[Tensor, "rows padded hidden"]:
    """These rows' stored activations on the base's device, padded to `width` with zeros."""
    index, inside = data.places(rows, width)
    hidden = stored[torch.from_numpy(index)].to(base.device)
    return hidden.mul_(torch.from_numpy(inside).to(base.device)[:, :, None])


def _as_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _as_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor
