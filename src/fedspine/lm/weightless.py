"""A base without weights, built from a model's configuration alone, and tensors that have only
shapes.

A model of any size loads in seconds and takes no memory: its parameters are on PyTorch's meta
device. Within `Weightless` new floating-point tensors are on it too, so that server and devices can
handle adapters without values; masks and indices are real, since shapes depend on them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from fedspine.core.task import Pooling, TaskKind
from fedspine.lm import gguf_files
from fedspine.lm.base import Base
from fedspine.lm.load import (
    MINILM_PACKAGE,
    config_of,
    head_layers,
    locate,
    package_folder,
    read,
    smollm2_file,
)
from fedspine.lm.pooling import built, readout_of, stock_class
from fedspine.lm.prunable_layout import held_in, layout_of

META = torch.device("meta")
FACTORIES = frozenset(
    (torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.tensor, torch.as_tensor)
)
STAYING = frozenset((Tensor.cpu, Tensor.to, Tensor.cuda))
READING = frozenset(
    (
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.data_ptr, Tensor.__array__),
        *(Tensor.__float__, Tensor.__int__, Tensor.__index__),
    )
)
# whose result's shape may depend on a mask
INDEXING = frozenset((Tensor.__getitem__, Tensor.__setitem__))


class Weightless(TorchFunctionMode):
    """A context manager within which new floating-point tensors have no values.

    The truth value of a tensor without values is False, so every comparison of them is.

    >>> with Weightless():
    ...     weights = torch.zeros(1 << 40, 4)
    ...     bool((weights.half() > 0).any()), weights[:2].shape
    (False, torch.Size([2, 4]))
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            return _from_factory(func, args, kwargs)
        if not any(map(_lacks_values, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func is Tensor.__bool__:
            return False
        if func in READING:
            raise NotImplementedError(f"{func.__name__} of a tensor without values")
        given = (*args, *kwargs.values())
        if func in STAYING and not any(isinstance(one, torch.dtype) for one in given):
            return args[0]
        if func not in INDEXING:
            args = [_without_values(arg) for arg in args]
            kwargs = {name: _without_values(arg) for name, arg in kwargs.items()}
        return func(*args, **kwargs)


def _from_factory(func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The tensor of a factory, without values if it is a floating-point one."""
    if func in (torch.tensor, torch.as_tensor):
        made = func(*args, **kwargs)
        return made.to(META) if made.is_floating_point() else made
    if not (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point:
        return func(*args, **kwargs)
    return func(*args, **(kwargs | {"device": META}))


def _lacks_values(value: Any) -> bool:
    """Whether an argument is a tensor without values, or a sequence with one."""
    if isinstance(value, list | tuple):
        return any(map(_lacks_values, value))
    return isinstance(value, Tensor) and value.device.type == META.type


def _without_values(value: Any) -> Any:
    """An argument without its values, if it is a tensor or a sequence."""
    if type(value) in (list, tuple):
        return type(value)(map(_without_values, value))
    return value.to(META) if isinstance(value, Tensor) else value


def load(
    name: str,
    *,
    kind: TaskKind,
    classes: int = 0,
    layers: int | None = None,
    pooling: Pooling | Literal["auto"] = "auto",
    bits: int | None = None,
) -> Base:
    """The base model `name` for this kind of task on the meta device; no weights are read.

    Only the header of a `.gguf` file is read. Arguments are those of `lm.load`. Layers after the
    backbone are assumed to be new unless the checkpoint was saved as the same kind of model. Raises
    BadInput for a configuration that cannot be found or read, or whose architecture has no unit
    map.
    """
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # no line for each retry
    source, options = described(name)
    config = config_of(name, source, kind=kind, layers=layers, **options)
    readout = readout_of(pooling, source, config, kind)
    if readout is not None:
        config.num_labels = classes
    with META:
        module = read(name, stock_class(readout).from_config, config, dtype=torch.float32)
        module = built(module, readout)
    layout = held_in(layout_of(module.config, module.base_model_prefix), bits)
    saved = type(module).__name__ in (config.architectures or ())
    head = (
        () if readout is None else head_layers(module, lambda path: not _in_checkpoint(path, saved))
    )
    return Base(module, layout, head, torch.float32, readout, weights_sha256="")


def _in_checkpoint(path: str, saved: bool) -> bool:
    """Whether a checkpoint holds the layer at `path` of the head; a bare backbone's has only the
    pooler.
    """
    return saved or ".pooler." in f".{path}."


def described(name: str) -> tuple[str, dict[str, Any]]:
    """The place of the configuration of the model `name`, and the options for reading it.

    Raises BadInput for a local path without a model.
    """
    if name == "smollm2":
        return _header(smollm2_file())
    if name == "minilm" and (folder := package_folder(MINILM_PACKAGE)) is not None:
        return str(folder / "model"), {}
    if gguf_files.is_gguf(name) and not Path(name).expanduser().is_dir():
        return _header(Path(name).expanduser())
    return locate(name), {}


def _header(file: Path) -> tuple[str, dict[str, Any]]:
    gguf_files.check_architecture(file)
    return str(file.parent), {"gguf_file": file.name}
