"""A graph of another runtime as a module with the interface of an export's stock classifier."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fedspine.exports.signature import IDS, MASK


class GraphModule(nn.Module):
    """A classifier that `graph` computes; without parameters, since the graph holds them."""

    def __init__(self, graph: Any, config: Any) -> None:
        super().__init__()
        self.graph, self.config = graph, config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor
    ) -> SequenceClassifierOutput:
        """`logits` fp32 [rows, classes], of int64 [rows, tokens].

        Without a mask all tokens count.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = {IDS: input_ids, MASK: mask} | inputs
        found = self.graph.logits({name: tensor.numpy() for name, tensor in given.items()})
        return SequenceClassifierOutput(logits=torch.from_numpy(found))
