"""Gaussian noise on what leaves a device: relative to the size of a change, relative to what one
row changes, or on a clipped update.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedspine.core.draws import Draws
from fedspine.core.message import Tensors
from fedspine.core.privacy import Guard

ROWS = 32  # rows behind an answer at which its noise has the full share
LARGEST = float(torch.finfo(torch.float16).max)  # the largest value that can be sent
PLAIN_ANSWERS = 2.0  # default number about the same 32 rows, after which noise grows
# nats that a label's loss counts for at most in a number that leaves with noise; otherwise weights
# that make the loss of some rows huge would reveal their number through any noise
MOST_LOSS = 4.0
TOGETHER = 2**19  # entries of weights that get their noise together
COUNTED = "answers"  # key of a device's memory: its number of answers about each text


def noise_like(tensor: Tensor, draws: Draws) -> Tensor:
    """Standard normal noise, fp32, in the tensor's shape and on its device."""
    drawn = torch.from_numpy(draws.normal(tensor.numel())).float()
    return drawn.view(tensor.shape).to(tensor.device)


def coarse_noise_like(tensor: Tensor, draws: Draws) -> Tensor:
    """As `noise_like`, from `Draws.coarse_normal`, which is coarser and faster."""
    drawn = torch.from_numpy(draws.coarse_normal(tensor.numel()))
    return drawn.view(tensor.shape).to(tensor.device)


def clipped(tensors: Tensors, most: float) -> Tensors:
    """The tensors scaled down so that their joint norm is at most `most`; zeros if the norm is not
    finite.

    >>> clipped({"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}, 1.0)
    {'x': tensor([0.6000]), 'y': tensor([0.8000])}
    """
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return {name: tensor * min(1.0, most / max(norm, most)) for name, tensor in tensors.items()}


def noisy_update(before: Tensors, after: Tensors, guard: Guard, multiplier: float) -> Tensors:
    """`before` plus the clipped and noisy difference to `after`, by name and with equal shapes.

    Replacing a device's data may move the update from one end of the ball of radius `clip` to the
    other, so its sensitivity is twice the radius.
    """
    update = clipped({name: after[name] - before[name] for name in before}, guard.terms.clip)
    deviation = multiplier * 2 * guard.terms.clip
    return {
        name: (
            before[name] + update[name] + deviation * noise_like(update[name], guard.draws)
        ).clamp(-LARGEST, LARGEST)
        for name in before
    }


def grown(answers: float, plain: float = PLAIN_ANSWERS) -> float:
    """The noise of the n-th answer about the same rows, relative to the first.

    It is 1 for the first `plain` answers, and for all if `plain` is 0.

    The average of all answers, weighted by inverse variance, has the noise of the first divided by
    the square root of the sum of 1 / grown(k) ** 2. That sum stays below 2 `plain` for any number
    of answers. For `plain` = 2 it is about 3.6, so 1 / 1.9 of the noise always remains.

    >>> [grown(answers) for answers in (1, 2, 3, 20)]
    [1.0, 1.0, 1.5, 10.0]
    """
    return max(1.0, answers / plain) if plain else 1.0


@dataclass(frozen=True)
class Noise:
    """The noise that a device adds to an answer, so that it reveals less of its rows.

    Unlike differential privacy it gives no numerical guarantee; docs/leakage.md states what attacks
    find in spite of it.
    """

    share: float  # of the change, for an answer about `ROWS` rows
    draws: Draws
    weight: float = 1.0  # of the change and its noise together

    def share_of(self, rows: int) -> float:
        """The share for an answer about `rows` distinct rows.

        It falls with the fourth root of their number, since an answer about more rows reveals less
        of each. With the square root, some texts among 640 rows could be recovered
        (docs/leakage.md).

        >>> from fedspine.core.draws import SeededDraws
        >>> Noise(4.0, SeededDraws((1,))).share_of(512)
        2.0
        """
        return self.share * (ROWS / max(rows, 1)) ** 0.25

    def beside(self, values: Tensor, one_row: float | Tensor) -> Tensor:
        """`values`, fp32, with noise of `share` times what one row more or less changes in each.

        >>> from fedspine.core.draws import SeededDraws
        >>> bool(Noise(8.0, SeededDraws((1,))).beside(torch.zeros(999), 0.1).std() > 0.7)
        True
        """
        return values.float() + self.share * one_row * coarse_noise_like(values, self.draws)

    def added(self, before: Tensors, after: Tensors, rows: int) -> Tensors:
        """`after` with noise on its change from `before`; tensors of one name have equal shapes.

        Change and noise are scaled by `weight`. Names that `before` lacks are not changed.
        """
        share, released = self.share_of(rows), dict(after)
        for names in _parts([name for name in before if after[name].numel()], after):
            count = sum(after[name].numel() for name in names)
            drawn = torch.from_numpy(self.draws.coarse_normal(count))
            noise = dict(
                zip(names, drawn.split([after[name].numel() for name in names]), strict=True)
            )
            for alike in _alike(names, before, after):
                stacked = [torch.stack([each[name] for name in alike]) for each in (before, after)]
                own = torch.stack([noise[name] for name in alike]).view(stacked[0].shape)
                noisy = self._with_noise(*stacked, own.to(stacked[0].device), share)
                released |= zip(alike, noisy.unbind(), strict=True)
        return released

    def _with_noise(self, sent: Tensor, trained: Tensor, drawn: Tensor, share: float) -> Tensor:
        """`trained` with noise, of weights of one shape in a stack; uses `drawn` up."""
        change = trained - sent
        drawn.mul_(_sizes(change, share))
        if self.weight == 1:
            drawn.add_(trained)
        else:
            drawn.add_(change).mul_(self.weight).add_(sent)
        return drawn.clamp_(-LARGEST, LARGEST)


@runtime_checkable
class AnswerCounter(Protocol):
    """A counter of a device's answers about each of its texts."""

    def count(self, texts: np.ndarray) -> float:
        """Count one more answer about these texts, int64; returns the mean number of answers about
        each of them, this one included.
        """
        ...


@dataclass
class MemoryAnswerCounter:
    """The counter of a simulated device, in its memory, which is saved with the run."""

    memory: dict[str, Any]

    def count(self, texts: np.ndarray) -> float:
        counts = np.zeros(int(texts.max(initial=-1)) + 1, np.int32)
        before = self.memory.get(COUNTED, counts[:0])
        counts = np.pad(before, (0, max(0, len(counts) - len(before))))
        counts[texts] += 1
        self.memory[COUNTED] = counts
        return float(counts[texts].mean()) if len(texts) else 1.0


@dataclass(frozen=True)
class GrowingNoise:
    """The noise of a device that is asked repeatedly: it grows with the number of answers about the
    same rows. Answers about more rows reveal less of each, so the growth starts later for them.

    A change whose noise has grown is scaled by its inverse variance, as in an optimal average. So
    late answers lose their effect before their noise spoils what was learnt.

    `draws` returns the draws of the n-th answer about the same rows: two answers with different
    shares of noise and the same draws would reveal the noise.
    """

    share: float  # of a first answer
    draws: Callable[[float], Draws]
    counter: AnswerCounter
    plain: float = PLAIN_ANSWERS  # of `grown`, about `ROWS` rows and fewer

    def about(self, texts: np.ndarray) -> Noise:
        """The noise of an answer about these texts; counts the answer."""
        answers = self.counter.count(texts)
        larger = grown(answers, self.plain * max(1.0, len(texts) / ROWS))
        return Noise(self.share * larger, self.draws(answers), larger**-2.0)


def _parts(names: list[str], tensors: Tensors) -> Iterator[list[str]]:
    """The names in turn, in parts of about `TOGETHER` entries: few calls for many small tensors,
    and little memory beside large ones.
    """
    part: list[str] = []
    entries = 0
    for name in names:
        part.append(name)
        entries += tensors[name].numel()
        if entries >= TOGETHER:
            yield part
            part, entries = [], 0
    if part:
        yield part


def _alike(names: list[str], before: Tensors, after: Tensors) -> Iterable[list[str]]:
    """The names of tensors that can be stacked."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        kind = (after[name].shape, after[name].dtype, before[name].dtype, after[name].device)
        groups.setdefault(kind, []).append(name)
    return groups.values()


def _sizes(changes: Tensor, share: float) -> Tensor:
    """`share` times the root mean square of each entry's row or column, whichever is larger, fp32
    in the shape of `changes`, which is a stack; for vectors, that of all entries of each.

    An order that trains only a few rows of a factor concentrates the change there, so these rows
    would stand out from noise scaled by the mean of the whole tensor.
    """
    power = changes.float().square()
    if changes.dim() < 3:
        flat = power.view(len(power), -1).mean(1).sqrt().mul_(share)
        return flat.view(-1, *[1] * (changes.dim() - 1))
    flat = power.flatten(2)
    by_row, by_column = (flat.mean(dim, keepdim=True).sqrt().mul_(share) for dim in (2, 1))
    return torch.maximum(by_row, by_column).view(changes.shape)
