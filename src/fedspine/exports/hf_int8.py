"""Folders in Hugging Face format whose blocks hold int8 weights, which stock transformers loads
through torchao.

Each row of a weight has one scale. Weights are expanded for each product, so a model is smaller and
not faster.
"""

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from fedspine.core.errors import BadInput, reason_of
from fedspine.core.task import Pooling
from fedspine.exports.card import CONFIG, WEIGHTS, Card
from fedspine.lm.frozen import EXTRA, torchao
from fedspine.lm.pooling import stock_class
from fedspine.lm.prunable_layout import layout_of

ENTRY = "quantization_config"  # of transformers in CONFIG


def check_installed() -> None:
    """Raise BadInput if a package is missing."""
    if not all(find_spec(package) for package in ("torchao", "accelerate")):
        raise BadInput(f"int8 weights of --format hf need torchao and accelerate; {EXTRA}")


def check(card: Card) -> None:
    """Raise BadInput for a model that no stock class of transformers can load, and if a package is
    missing.
    """
    check_installed()
    if card.pooling == "bi-encoder":
        raise BadInput(
            "--quantize int8 of --format hf is for what stock transformers loads, which has no "
            "class for a bi-encoder; use --format onnx"
        )
    if not card.stock:
        raise BadInput(
            "--quantize int8 of --format hf is for what stock transformers loads, and no stock "
            "configuration can describe the sizes of this model's layers; use --format onnx, or "
            'tune with method.structure = "uniform"'
        )


def quantise(folder: Path, card: Card) -> None:
    """Replace the fp32 weights of the blocks in an exported folder by int8.

    Embeddings, norms, biases and the head stay. Raises BadInput for a model that torchao cannot
    quantise.
    """
    from transformers import TorchAoConfig

    how = TorchAoConfig(
        torchao().Int8WeightOnlyConfig(), modules_to_not_convert=_outside(folder, card.pooling)
    )
    module = _loaded(folder, card.pooling, quantization_config=how)
    with tempfile.TemporaryDirectory() as scratch:
        module.save_pretrained(scratch)
        (folder / WEIGHTS).unlink()  # the module has a mapping of it
        shutil.copyfile(Path(scratch) / WEIGHTS, folder / WEIGHTS)
        entry = json.loads((Path(scratch) / CONFIG).read_text(encoding="utf-8"))[ENTRY]
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {ENTRY: entry}
    (folder / CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def load(folder: Path, card: Card) -> nn.Module:
    """The stock module with int8 weights; raises BadInput for a damaged folder, or without torchao
    or accelerate.
    """
    check_installed()
    return _loaded(folder, card.pooling)


def _loaded(folder: Path, pooling: Pooling | None, **settings: Any) -> nn.Module:
    torchao()  # imported in silence
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        module, found = stock_class(pooling).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # transformers and torchao raise many types
        raise BadInput(
            f"the int8 weights in {folder} cannot be read ({reason_of(error)}); export the model "
            "again"
        ) from None
    finally:
        if shown:
            logging.enable_progress_bar()
    for wrong, names in found.items():
        if names:
            raise BadInput(
                f"{folder / WEIGHTS} does not fit its configuration ({wrong}: {len(names)}); "
                "export the model again"
            )
    return module


def _outside(folder: Path, pooling: Pooling | None) -> list[str]:
    """The linear layers that are not in the blocks."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        module = stock_class(pooling).from_config(config)
    inside = {site.path for site in layout_of(config, module.base_model_prefix).sites}
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and name not in inside
    ]
