"""One digest of a base model, which two machines compare before a run."""

import hashlib
import json
from typing import Any

import torch

from fedspine.core.message import pack
from fedspine.lm.base import Base
from fedspine.lm.dialogues import PLAIN, template_of
from fedspine.lm.frozen import expanded
from fedspine.lm.tokens import written


def content_sha256(base: Base, tokenizer: Any) -> str:
    """A digest of the architecture, the weights in the base's precision and the tokenizer.

    Layers that the checkpoint did not hold are left out, since a method draws them anew from its
    own seed.
    """
    digest = hashlib.sha256()
    digest.update(pack(base.layout).payload)
    digest.update(json.dumps(written(tokenizer), sort_keys=True).encode("utf-8", "surrogatepass"))
    if (template := template_of(tokenizer)) != PLAIN:  # which stands for none
        digest.update(json.dumps(template).encode("utf-8", "surrogatepass"))
    fresh = {name for layer in base.head if layer.fresh for name in layer.tensors}
    tensors = dict(base.whole_skeleton().state_dict())
    for path, (weight, bias) in base.weights.items():
        tensors |= {f"{path}.weight": expanded(weight)} | (
            {} if bias is None else {f"{path}.bias": bias}
        )
    for layer in base.head:
        tensors |= layer.tensors
    for name in sorted(tensors.keys() - fresh):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(
            memoryview(tensor.view(torch.uint8).numpy())
            if tensor.dim()
            else tensor.numpy().tobytes()
        )
    return digest.hexdigest()
