"""An ONNX graph as a module, so that whatever reads the stock module of an export reads it, too."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fedspine.exports.onnx_graph import Graph


class OnnxModule(nn.Module):
    """The graph in `path`, run by ONNX Runtime; without parameters, since the graph holds them.

    Raises BadInput for a file that is no graph.
    """

    def __init__(self, path: Path, config: Any, threads: int | None = None) -> None:
        super().__init__()
        self.graph, self.config = Graph(path, threads), config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor
    ) -> SequenceClassifierOutput:
        """`logits` fp32 [rows, classes], of int64 [rows, tokens].

        Without a mask all tokens count.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {"input_ids": input_ids, "attention_mask": mask} | inputs
        found = self.graph.logits({name: tensor.numpy() for name, tensor in given.items()})
        return SequenceClassifierOutput(logits=torch.from_numpy(found))
