"""A language model's ONNX graph as a module with the interface of an export's stock module."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedspine.exports.onnx_graph import PAST, PRESENT, Graph
from fedspine.exports.signature import IDS, LOGITS, MASK


class OnnxDecoder(PreTrainedModel, GenerationMixin):
    """A decoder's graph with its cache, which transformers' `generate` runs token by token.

    Raises BadInput for a file that is not a graph.
    """

    main_input_name = IDS

    def __init__(self, path: Path, config: Any, threads: int | None = None) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # unused here, and valid for every class
        super().__init__(config)
        self.graph = Graph(path, threads)
        # empty: generation and scoring take the device to compute on from the parameters
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def generate(self, *arguments: Any, **settings: Any) -> Any:
        """As transformers' own, with a cache that keeps all tokens: the graph applies windows."""
        return super().generate(*arguments, past_key_values=DynamicCache(), **settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """`logits` fp32 [rows, tokens, vocabulary], of int64 [rows, tokens] after what is cached.

        The mask is int64 [rows, cached and new tokens]; without one all tokens count. Positions are
        derived from it, so position ids are ignored.
        """
        cache = DynamicCache() if past_key_values is None else past_key_values
        rows, tokens = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(rows, cache.get_seq_length() + tokens, dtype=torch.int64)
        given = {IDS: input_ids.numpy(), MASK: attention_mask.numpy()}
        for i, layer in enumerate(cache.layers):
            given |= {
                f"{PAST}.{i}.key": layer.keys.numpy(),
                f"{PAST}.{i}.value": layer.values.numpy(),
            }
        found = self.graph.run(given)
        _keep(cache, found)
        logits = torch.from_numpy(found[LOGITS])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def _keep(cache: DynamicCache, found: dict[str, np.ndarray]) -> None:
    """Replace the cache by the one that the graph returned."""
    layers = sum(name.startswith(PRESENT) for name in found) // 2
    for i in range(layers):
        keys, values = (
            torch.from_numpy(found[f"{PRESENT}.{i}.{part}"]) for part in ("key", "value")
        )
        if i == len(cache.layers):
            cache.update(keys, values, i)
        else:
            cache.layers[i].keys, cache.layers[i].values = keys, values
