"""An exported model ready to run, whatever its format."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from fedspine.core.task import TaskKind
from fedspine.data.array_rows import RowShape

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
    bi_encoder: bool = False  # whether it encodes each text of a pair separately
    runtime: str = field(default="PyTorch", compare=False)  # what computes it


@dataclass(frozen=True)
class LoadedNet:
    """An exported net on arrays ready to run, whose graph reads rows as the data has them."""

    graph: Any  # an `onnx_graph.Graph`
    net: str
    reads: RowShape
    parameters: int
    kind: TaskKind = "array"
    runtime: str = field(default="ONNX Runtime", compare=False)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.reads.classes

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """fp32 [rows, classes], of rows of the shape and type that the net reads."""
        found: np.ndarray = self.graph.logits({"input": rows})
        return found


AnyLoaded: TypeAlias = Loaded | LoadedNet
