"""pfl-research's simulator (PyPI `pfl`) at its best: one process per core, users shared out, one
all-reduce a round.
"""

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from peers.loop import Learner, learner
from peers.work import Outcome, Way, Work

RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"  # pfl's own names


def run(work: Work, way: Way) -> Outcome:
    """FedAvg over the whole work; this process is pfl's first worker and starts the others."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    if RANK in os.environ:
        _run(work, way, cores)
        sys.exit()
    os.environ |= {RANK: "0", ADDRESSES: ",".join([f"127.0.0.1:{_free_port()}"] * cores)}
    again = [sys.executable, *sys.orig_argv[1:]]
    helpers = [
        subprocess.Popen(again, env=os.environ | {RANK: str(rank)}) for rank in range(1, cores)
    ]
    outcome = _run(work, way, cores)
    for helper in helpers:
        helper.wait()
    return outcome


def _run(work: Work, way: Way, processes: int) -> Outcome:
    # pfl joins its workers when it is imported
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchDataDataset
    from pfl.hyperparam.base import HyperParam, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    settings = work.settings
    mine = learner(work.folder, way)
    times: list[float] = []

    class User(PyTorchDataDataset):
        """One device in one round; it brings its batches as they are."""

        def __init__(self, user: tuple[int, int, int]) -> None:
            round, device, asked = user
            super().__init__(work.shares[device], user_id=str(device))
            self.inputs = (device, asked, round, way.padding)

        def iter(self, batch_size: int | None) -> Iterator[dict[str, Any]]:
            return work.inputs(*self.inputs)

    class Average(FederatedAveraging):
        """Without pfl's evaluation of the first round, which no other contender has."""

        def get_next_central_contexts(self, *arguments: Any) -> Any:
            contexts, model, metrics = super().get_next_central_contexts(*arguments)
            plain = contexts and tuple(
                dataclasses.replace(one, do_evaluation=False) for one in contexts
            )
            return plain, model, metrics

    class Pace(HyperParam, TrainingProcessCallback):
        """The learning rate of the round, and the time."""

        def on_train_begin(self, *, model: Any) -> Any:
            times.append(perf_counter())
            return super().on_train_begin(model=model)

        def after_central_iteration(self, *arguments: Any, **options: Any) -> Any:
            times.append(perf_counter())
            return super().after_central_iteration(*arguments, **options)

        def value(self) -> float:
            return work.tuning(min(len(times) - 1, settings.rounds - 1)).learning_rate

    users = ((number, *who) for number, chosen in enumerate(work.plan) for who in chosen)
    pace = Pace()
    weight_decay = work.tuning(0).weight_decay
    model = PyTorchModel(
        model=_Module(mine),
        local_optimizer_create=lambda parameters, lr: torch.optim.AdamW(
            parameters, lr=lr, weight_decay=weight_decay, fused=True
        ),
        central_optimizer=torch.optim.SGD(mine.trained.values(), lr=1.0),  # which makes it FedAvg
    )
    backend = SimulatedBackend(
        training_data=FederatedDataset(User, lambda: next(users)),
        val_data=None,  # type: ignore[arg-type]
        postprocessors=[WeightByDatapoints()],
    )
    Average().run(
        NNAlgorithmParams(
            central_num_iterations=settings.rounds,
            evaluation_frequency=settings.rounds,
            train_cohort_size=settings.per_round,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_batch_size=settings.batch,
            local_num_epochs=1,
            local_learning_rate=pace,
            local_max_grad_norm=1.0,
        ),
        callbacks=[pace],
    )
    tensors = {name: parameter.detach().clone() for name, parameter in mine.trained.items()}
    rounds = [after - before for before, after in pairwise(times)]
    return Outcome(
        rounds, None, processes, mine.accuracy(tensors) if os.environ[RANK] == "0" else None
    )


class _Module(torch.nn.Module):
    """A learner as pfl wants its models: a module with `loss` and `metrics`."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.inner, self.loss = learner.module, learner.loss

    def metrics(self, **inputs: torch.Tensor) -> dict[str, Any]:
        return {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
