"""Writing tokens after prompts: greedily, or drawn with a seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# at a lower temperature the likeliest token is taken: a logit that is 0.001 larger is e^1000 times
# as likely, and dividing by still less would not be finite
LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: at temperature 0 the likeliest, else drawn at that temperature with a
    seed.
    """

    new_tokens: int = 40  # at most
    temperature: float = 0.0
    seed: int = 0


def ends_of(tokenizer: Any, settings: Any, *more: int | None) -> list[int]:
    """The tokens that end what a model writes: the tokenizer's end token, those of the model's
    `settings` of generation, and `more`.
    """
    stated = settings.eos_token_id
    of_model = stated if isinstance(stated, list) else [stated]
    return sorted({end for end in (tokenizer.eos_token_id, *of_model, *more) if end is not None})


def written(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    ends: Iterable[int],
    padding: int,
    streamer: Any = None,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, up to the one that ends it, that one
    included; all prompts in one batch.

    `streamer` is one of transformers, for a single prompt.
    """
    ends, width = list(ends), max(map(len, prompts))
    device = next(module.parameters()).device
    # padding comes before a prompt, so that all go on at the same place
    ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    drawn = decoding.temperature >= LOWEST_TEMPERATURE
    chosen = {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0} if drawn else {}
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(decoding.seed)
        whole = module.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=decoding.new_tokens,
            do_sample=drawn,
            use_cache=True,
            pad_token_id=padding,
            eos_token_id=ends or None,
            streamer=streamer,
            **chosen,
        )
    return [_until_end(row[width:].tolist(), ends) for row in whole]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    places = [place for place, id in enumerate(ids) if id in ends]
    return ids[: places[0] + 1] if places else ids
