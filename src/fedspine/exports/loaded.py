"""An exported model that runs, whatever its format is."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedspine.core.task import Kind

READ_BACK = "PyTorch, with the numbers of the file"  # a runtime, where the format's own is missing


@dataclass(frozen=True)
class Loaded:
    """An exported model ready to run: a stock transformers module, in fp32, with plain linear
    layers, or one that another runtime computes and that is called the same way.
    """

    module: nn.Module
    tokenizer: Any
    kind: Kind
    labels: tuple[str, ...]
    max_tokens: int
    sparsity: float  # NaN where a file of others does not say
    parameters: int
    block_parameters: int  # of the prunable linear layers' weights, which sparsity is counted on
    chat: bool = False  # whether it was tuned on dialogues, so that it answers
    runtime: str = field(default="PyTorch", compare=False)  # what computes it
