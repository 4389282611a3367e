"""An exported model ready to run, whatever its format."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedspine.core.task import TaskKind

READ_BACK = "PyTorch, with the numbers of the file"  # the runtime if the format's own is missing


@dataclass(frozen=True)
class Loaded:
    """An exported model ready to run: a stock transformers module in fp32 with plain linear layers,
    or a module with the same interface that another runtime computes.
    """

    module: nn.Module
    tokenizer: Any
    kind: TaskKind
    labels: tuple[str, ...]
    max_tokens: int
    sparsity: float  # NaN for a file of another tool, which does not state it
    parameters: int
    block_parameters: int  # of the prunable linear layers' weights, which sparsity refers to
    chat: bool = False  # whether it was tuned on dialogues and so answers
    runtime: str = field(default="PyTorch", compare=False)  # what computes it
