"""A GGUF file as a module that llama.cpp runs, with the interface of the stock decoder module."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fedspine.exports.llama_cpp import Context, File

CONTEXTS = 4  # kept, since creating one costs more than a short call


class Output:
    """Logits that are copied only when they are read: copying is not part of the latency."""

    def __init__(self, context: Context, mask: np.ndarray) -> None:
        self._context, self._mask = context, mask

    @property
    def logits(self) -> Tensor:
        """fp32 [rows, tokens, vocabulary]; zero where the mask is zero."""
        found = self._context.logits(range(int(self._mask.sum())))
        whole = np.zeros((*self._mask.shape, found.shape[1]), np.float32)
        whole[self._mask] = found
        return torch.from_numpy(whole)


class LlamaModule(nn.Module):
    """The model in the file `path`; `threads` None: one per core.

    Raises BadInput for a file that llama.cpp cannot read.
    """

    def __init__(self, path: Path, config: Any, ends: int | None, threads: int | None) -> None:
        super().__init__()
        self.config, self.generation_config = config, GenerationConfig(eos_token_id=ends)
        self._file = File(path, threads or os.cpu_count() or 1)
        self._contexts: dict[tuple[int, int], Context] = {}
        # empty: scoring and generation take the device to compute on from the parameters
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Output:
        """The logits of int64 [rows, tokens]; rows are padded at the end."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = mask.bool().numpy()
        rows = [ids[real] for ids, real in zip(input_ids.numpy(), kept, strict=True)]
        context = self._context(*input_ids.shape)
        context.decode(rows)
        return Output(context, kept)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        eos_token_id: Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any = None,
        **_: Any,
    ) -> Tensor:
        """int64 [rows, tokens and new ones], as `generate` of transformers; one step per token.

        Rows are padded at the start; sampling uses torch's generator.
        """
        ends = frozenset(eos_token_id or ())
        new = [
            self._written(
                ids[mask.bool()], max_new_tokens, temperature if do_sample else 0.0, ends, streamer
            )
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        longest = max(map(len, new))
        filled = [row + [pad_token_id or 0] * (longest - len(row)) for row in new]
        return torch.cat([input_ids, torch.tensor(filled, dtype=torch.int64)], 1)

    def _written(
        self, prompt: Tensor, most: int, temperature: float, ends: frozenset[int], streamer: Any
    ) -> list[int]:
        context, new = self._context(1, len(prompt) + most), []
        if streamer is not None:
            streamer.put(prompt[None])
        context.decode([prompt.tolist()])
        logits = context.logits([len(prompt) - 1])[0]
        while len(new) < most:
            new.append(_chosen(torch.from_numpy(logits), temperature))
            if streamer is not None:
                streamer.put(torch.tensor(new[-1:]))
            if new[-1] in ends or len(new) == most:
                break
            context.decode([new[-1:]], start=len(prompt) + len(new) - 1)
            logits = context.logits([0])[0]
        if streamer is not None:
            streamer.end()
        return new

    def _context(self, rows: int, tokens: int) -> Context:
        """An empty context of at least this size."""
        key = rows, -(-tokens // 256)
        if key not in self._contexts:
            while len(self._contexts) >= CONTEXTS:
                del self._contexts[next(iter(self._contexts))]
            self._contexts[key] = self._file.context(rows, tokens)
        self._contexts[key].clear()
        return self._contexts[key]


def _chosen(logits: Tensor, temperature: float) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1))
