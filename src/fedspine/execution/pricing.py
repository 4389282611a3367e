"""The price of work on a device: the simulator's charges without the training.

The work function runs on a base without weights (`lm.weightless`); only `lm.tune` accounts for
training instead of training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspine.core.device import Device, Work, pricing_of
from fedspine.core.task import Data
from fedspine.lm import distillation
from fedspine.lm.prefix import first_block
from fedspine.lm.request import Request, TuneResult
from fedspine.lm.structure import sparsity
from fedspine.lm.training_account import account, ranks_by_block

LOSS = 1.0986122886681098  # ln 3: in a message it has as many digits as most losses


@dataclass(frozen=True)
class Trained:
    """The extent of one training: which part of the model it changes."""

    rank: int  # the largest of the trained blocks
    depth: int  # from the lowest trained block to the output
    blocks: int  # trained blocks
    sparsity: float


@dataclass(frozen=True)
class Price:
    """The cost of one ask on a device, and a placeholder for its result."""

    flops: float
    launches: int
    peak_memory_bytes: int
    result: Any
    trained: Trained | None  # None without training


@dataclass
class _Accountant:
    """A trainer for `lm.tune` that accounts for training and trains nothing."""

    trained: Trained | None = field(default=None, init=False)

    def __call__(self, request: Request) -> TuneResult:
        device, model, tuning = request.device, request.model, request.tuning
        layout = device.base.layout
        if request.taught is not None:
            rows = np.arange(min(tuning.steps * tuning.batch, len(device.data)))
            distillation.charge(device, request.taught, rows)
        width = device.data.width(np.arange(len(device.data)))
        account(request, [width] * tuning.steps, first_block(layout, model))
        ranks = {
            block: rank
            for block, rank in enumerate(ranks_by_block(layout, model))
            if rank and block in request.trained
        }
        self.trained = Trained(
            rank=max(ranks.values(), default=0),
            depth=layout.layers - min(ranks, default=layout.layers),
            blocks=len(ranks),
            sparsity=sparsity(layout, model.structure),
        )
        return TuneResult(model=model, loss=LOSS, scores=None, moments=None)


def price(
    work: Work[Any, Any], order: Any, *, base: Any, data: Data, memory: Mapping[str, Any]
) -> Price:
    """The cost of `work` on a device with these rows and this memory, which is not changed.

    Call it within `lm.weightless.Weightless`. All rows of `data` are assumed to be as long as the
    longest, so which rows are drawn does not matter.
    """
    accountant = _Accountant()
    device = Device(
        id="",
        data=data,
        base=base,
        memory=dict(memory),
        rng=np.random.default_rng(0),
        trainer=accountant,
    )
    result = pricing_of(work)(device, order)
    return Price(
        flops=device.flops,
        launches=device.launches,
        peak_memory_bytes=device.peak_memory_bytes,
        result=result,
        trained=accountant.trained,
    )
