"""The inputs and outputs of exported graphs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# the names of a transformer's, in every runtime
IDS, MASK, SEGMENTS = "input_ids", "attention_mask", "token_type_ids"  # int64 [rows, tokens]
LOGITS = "logits"  # fp32 [rows, classes], of decoders [rows, tokens, vocabulary]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a graph, and the arguments it is traced with.

    `example` are the module's arguments, and `free` the names of their dynamic dimensions, as
    `torch.export` takes them. In the example a dynamic dimension is above 1 and no two are equal,
    else it would become a constant.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Mapping[str, Any]
    free: Mapping[str, Any]
