"""Local training as one writes it with transformers and PEFT, and a bare federated loop around it,
no framework.

The base is frozen in fp32 or bf16; adapters and the task head are fp32, and with a bf16 base
autocast makes the products bf16. Dropout is off, as it is in fedspine.
"""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedspine.core.tensors import average
from fedspine.lm.load import PRECISIONS, locate
from fedspine.lm.score import score_module
from peers.work import Outcome, Way, Work

BLOCKS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # every linear layer of the blocks
HEAD = ["pooler", "classifier"]
CLIP = 1.0


Arrays: TypeAlias = dict[str, np.ndarray]
Ask: TypeAlias = tuple[
    Arrays, int, int, int
]  # what to start from, round, device, how often it was asked before


@dataclass(frozen=True)
class Tuned:
    arrays: Arrays  # adapter and head by fedspine's names
    examples: int
    seconds: float


class Learner:
    """One model in one process, kept from ask to ask: the best case of any framework."""

    def __init__(self, work: Work, way: Way) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        settings = work.settings
        base = AutoModelForSequenceClassification.from_pretrained(
            locate("minilm"),
            num_labels=work.classes,
            dtype=PRECISIONS[way.precision],
            attn_implementation=way.attention,
        )
        adapters = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank * settings.scale,  # type: ignore[arg-type]
            target_modules=BLOCKS,
            modules_to_save=HEAD,
        )
        self.work, self.way = work, way
        self.module = get_peft_model(base, adapters).eval()
        self.trained = {
            _name(name): p for name, p in self.module.named_parameters() if p.requires_grad
        }
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
        self.put(work.initial())

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Set adapter and head; names must be exactly those of this model."""
        if tensors.keys() != self.trained.keys():
            raise KeyError(
                f"{len(self.trained)} trained tensors here, {len(tensors)} came, named otherwise"
            )
        for name, tensor in tensors.items():
            self.trained[name].data.copy_(tensor)

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of one batch."""
        with self.casting():
            logits = self.module(input_ids=input_ids, attention_mask=attention_mask).logits
        return nn.functional.cross_entropy(logits.float(), labels)

    def casting(self) -> AbstractContextManager:
        return (
            torch.autocast("cpu", torch.bfloat16) if self.way.precision == "bf16" else nullcontext()
        )

    def tune(self, tensors: dict[str, Tensor], device: int, asked: int, round: int) -> Tuned:
        """Train on one device's batches from `tensors`, with a fresh AdamW."""
        started = perf_counter()
        self.put(tensors)
        parameters, tuning = list(self.trained.values()), self.work.tuning(round)
        optimiser = torch.optim.AdamW(
            parameters, lr=tuning.learning_rate, weight_decay=tuning.weight_decay, fused=True
        )
        for inputs in self.work.inputs(device, asked, round, self.way.padding):
            self.loss(**inputs).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimiser.step()
            optimiser.zero_grad()
        tuned = {
            name: parameter.detach().clone().numpy() for name, parameter in self.trained.items()
        }
        return Tuned(tuned, len(self.work.shares[device]), perf_counter() - started)

    def accuracy(self, tensors: dict[str, Tensor]) -> float:
        """The share of test rows that the model with these tensors gets right."""
        self.put(tensors)
        with self.casting():
            return score_module(self.module, self.work.test).accuracy


def _name(parameter: str) -> str:
    """fedspine's name of a PEFT parameter."""
    plain = parameter.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return plain.removesuffix(".default.weight") if ".lora_" in plain else plain


@cache
def learner(folder: Path, way: Way) -> Learner:
    """The model of this process for this work, made once."""
    return Learner(Work(folder), way)


# --- the bare loop ---


def run(work: Work, way: Way, *, processes: int, threads: int) -> Outcome:
    """FedAvg in a plain loop: in this process with `threads` threads, or over forked ones of one
    thread each.
    """
    torch.set_num_threads(threads)
    ask = partial(_ask, work.folder, way)
    learner(work.folder, way)  # which forked processes inherit
    if processes == 1:
        return _rounds(work, way, 1, partial(map, ask))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(abs, range(processes)))  # start them
        return _rounds(work, way, processes, partial(pool.map, ask))


def _rounds(
    work: Work, way: Way, processes: int, each: Callable[[Iterable[Ask]], Iterable[Tuned]]
) -> Outcome:
    arrays, seconds, passes = _arrays(work.initial()), [], []
    for number, chosen in enumerate(work.plan):
        started = perf_counter()
        replies = list(each((arrays, number, *who) for who in chosen))
        arrays = _arrays(average((reply.examples, _tensors(reply.arrays)) for reply in replies))
        seconds.append(perf_counter() - started)
        passes.append(sum(reply.seconds for reply in replies))
    return Outcome(seconds, passes, processes, learner(work.folder, way).accuracy(_tensors(arrays)))


def _ask(folder: Path, way: Way, ask: Ask) -> Tuned:
    arrays, round, device, asked = ask
    return learner(folder, way).tune(_tensors(arrays), device, asked, round)


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _arrays(tensors: dict[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
