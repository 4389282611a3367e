"""A base without weights, from a model's configuration alone, and tensors that have shapes only.

A model of any size takes seconds and no memory: its parameters are on PyTorch's meta device. Within
`Weightless` new floating-point tensors are there, too, so what server and devices do with adapters
goes on without a number; masks and indices are real, since shapes follow from them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from fedspine.core.task import Kind
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
from fedspine.lm.pooling import CLASSES, Pooling, pooling_of
from fedspine.lm.prunable_layout import layout_of

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
# of which the shape may follow from a mask
INDEXING = frozenset((Tensor.__getitem__, Tensor.__setitem__))


class Weightless(TorchFunctionMode):
    """While it is used as a context manager, floating-point tensors are made without numbers.

    What is asked of such numbers is taken as not so, such as whether one is above another.

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
            return _made(func, args, kwargs)
        if not any(map(_bare, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func is Tensor.__bool__:
            return False
        if func in READING:
            raise NotImplementedError(f"{func.__name__} of a tensor without numbers")
        given = (*args, *kwargs.values())
        if func in STAYING and not any(isinstance(one, torch.dtype) for one in given):
            return args[0]
        if func not in INDEXING:
            args = [_without_numbers(arg) for arg in args]
            kwargs = {name: _without_numbers(arg) for name, arg in kwargs.items()}
        return func(*args, **kwargs)


def _made(func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """What a factory makes, without numbers where it is of floating point."""
    if func in (torch.tensor, torch.as_tensor):
        made = func(*args, **kwargs)
        return made.to(META) if made.is_floating_point() else made
    if not (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point:
        return func(*args, **kwargs)
    return func(*args, **(kwargs | {"device": META}))


def _bare(value: Any) -> bool:
    """Whether an argument is a tensor without numbers, or a sequence with one."""
    if isinstance(value, list | tuple):
        return any(map(_bare, value))
    return isinstance(value, Tensor) and value.device.type == META.type


def _without_numbers(value: Any) -> Any:
    """An argument without numbers, where it is a tensor or a sequence."""
    if type(value) in (list, tuple):
        return type(value)(map(_without_numbers, value))
    return value.to(META) if isinstance(value, Tensor) else value


def load(
    name: str,
    *,
    kind: Kind,
    classes: int = 0,
    layers: int | None = None,
    pooling: Pooling | Literal["auto"] = "auto",
) -> Base:
    """The base model `name` for this kind of task on the meta device; no file of weights is read.

    Of a `.gguf` file only the header is. As in `lm.load`; layers behind the backbone are taken to
    be new, but for those of a checkpoint that was saved as the same kind of model. Raises BadInput
    for a configuration that cannot be found or read, or whose architecture has no unit map.
    """
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # not a line for each time that it tries again
    source, options = described(name)
    config = config_of(name, source, kind=kind, layers=layers, **options)
    readout: Pooling | None = None
    if kind != "causal-lm":
        readout = pooling_of(source, config) if pooling == "auto" else pooling
        config.num_labels = classes
    with META:
        module = read(name, CLASSES[readout].from_config, config, dtype=torch.float32)
    layout = layout_of(module.config, module.base_model_prefix)
    saved = type(module).__name__ in (config.architectures or ())
    head = () if readout is None else head_layers(module, lambda path: not _held(path, saved))
    return Base(module, layout, head, torch.float32, readout, weights_sha256="")


def _held(path: str, saved: bool) -> bool:
    """Whether a checkpoint holds the layer at `path` of the head; that of a bare backbone has its
    pooler.
    """
    return saved or ".pooler." in f".{path}."


def described(name: str) -> tuple[str, dict[str, Any]]:
    """Where the configuration of the model `name` is, and how it is read from there.

    Raises BadInput for a local path that is no model.
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
