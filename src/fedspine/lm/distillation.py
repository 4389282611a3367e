"""Recovery by distillation: on its own rows a device teaches its pruned model what its unpruned one
says, the dense base with the adapter and the head that it received.

Before a device trains, the teacher runs once over the rows that will be drawn; its logits, and the
mean over the tokens of what leaves each block, are held until training ends. Of a language model,
what enters the output layer is held in place of the logits of every token, which follow from it: no
method trains that layer. Pruning leaves the width of the hidden states as it is, so each block of
the student has its own block of the teacher.

Sources: Hinton et al. 2015 (arXiv:1503.02531) for logits at a temperature; CoFi, Xia et al. 2022
(arXiv:2204.00408), for hidden states of a model that is pruned, there of all tokens with a layer
mapping that is learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedspine.core.checks import Asked, need, within
from fedspine.core.device import Device
from fedspine.core.errors import BadInput, check_ranges
from fedspine.core.message import Tensors, message
from fedspine.core.task import IGNORED, Task
from fedspine.core.tensors import moved
from fedspine.lm.attention import module_inputs
from fedspine.lm.base import Base, Model
from fedspine.lm.cost import Extent, teaching_flops, teaching_memory_bytes
from fedspine.lm.lora import adapter_rank
from fedspine.lm.pooling import mean_of_tokens
from fedspine.lm.prefix import BATCH

# with one far smaller, logits overflow, and which do would show whatever the noise of an answer
TEMPERATURES = (1e-2, 1e2)


@message
class Teaching:
    """How a teacher counts in what a device minimises."""

    temperature: float
    weight: float  # of the teacher's answers; the rest is that of the labels
    hidden: float  # weight of the hidden states, beside both; 0: they are not looked at
    own: bool  # whether the teacher is what the device trained itself before it pruned

    def check(self, asked: Asked) -> None:
        within("weight", self.weight, 0, 1)
        within("temperature", self.temperature, *TEMPERATURES)
        need(self.hidden >= 0, f"hidden is {self.hidden}, but it cannot be negative")


@dataclass(frozen=True)
class NoTeacher:
    """A pruned model learns from labels alone."""

    name: ClassVar = "none"

    @property
    def order(self) -> Teaching | None:
        return None

    def check(self, task: Task) -> None:
        pass


@dataclass(frozen=True)
class DenseTeacher:
    """A pruned model learns from the device's unpruned one, too.

    Its adapter is the one that came, which is tuned for pruned models meanwhile, or "own": the one
    that the device last trained itself before it pruned. A device that has none takes the one that
    came; if it has a language model, none, since the base alone is one, too.
    """

    name: ClassVar = "dense"
    temperature: float = 2.0
    weight: float = 0.5  # of the teacher's answers; the rest is that of the labels
    hidden: float = 0.0  # weight of the squared distance of mean hidden states, beside both
    adapter: Literal["current", "own"] = "current"

    @property
    def order(self) -> Teaching | None:
        return Teaching(
            temperature=self.temperature,
            weight=self.weight,
            hidden=self.hidden,
            own=self.adapter == "own",
        )

    def check(self, task: Task) -> None:
        """Raise BadInput for numbers that cannot be."""
        check_ranges(self, {"weight": (0, 1), "temperature": TEMPERATURES}, "method.teacher")
        if not (self.hidden >= 0 and isfinite(self.hidden)):
            raise BadInput(f"method.teacher.hidden is {self.hidden:g}, but it cannot be negative")


Teacher: TypeAlias = NoTeacher | DenseTeacher


@dataclass(frozen=True)
class Taught:
    """The teacher of one training, and how it counts."""

    teacher: Model
    teaching: Teaching


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher says about some of a device's rows."""

    place: np.ndarray  # int64 [rows of the device], where a row is below
    logits: Tensor  # fp32 [rows, classes]
    hidden: Tensor  # fp32 [rows, blocks, width], means over tokens; of no blocks if not asked for

    def of(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of these rows, in their order."""
        at = torch.from_numpy(self.place[rows]).to(self.logits.device)
        return self.logits[at], self.hidden[at]


@dataclass(frozen=True)
class TokenOutputs:
    """What a teacher says about every token of some of a device's rows."""

    place: np.ndarray  # int64 [rows of the device], where a row's hidden states are below
    starts: np.ndarray  # int64 [rows of the device], where a row's tokens begin below
    states: Tensor  # [tokens, width], what enters the output layer, in the base's precision
    output: nn.Module  # the output layer, which the student shares
    hidden: Tensor  # as those of `TeacherOutputs`

    def distance(
        self,
        logits: Float[Tensor, "rows tokens vocabulary"],
        labels: Int[Tensor, "rows tokens"],
        rows: np.ndarray,
        temperature: float,
    ) -> Float[Tensor, ""]:
        """The mean of `distances` over the tokens of these rows that count as labels, 0 where none
        does.
        """
        row, token = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        starts = torch.from_numpy(self.starts[rows]).to(row.device)
        with torch.no_grad():
            answers = self.output(self.states[starts[row] + token]).float()
        if not len(row):
            return logits.new_zeros((), dtype=torch.float32)
        return distances(logits[row, token], answers, temperature, 1)[0]


class Hidden:
    """The means over tokens of what leaves each block in the last forward pass, while it is used as
    a context manager.
    """

    def __init__(self, base: Base, asked: bool) -> None:
        self._blocks = base.blocks if asked else []
        self._seen: list[Tensor] = []

    def __enter__(self) -> "Hidden":
        self._handles = [block.register_forward_hook(self._record) for block in self._blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, block: nn.Module, inputs: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._seen.append(hidden)  # type: ignore[arg-type]

    def take(self, mask: Tensor, rows: int) -> Float[Tensor, "rows blocks width"]:
        """[rows, blocks, width] of the last pass over this attention mask."""
        seen, self._seen = self._seen, []
        if not seen:
            return torch.zeros(rows, 0, 0, device=mask.device)
        return torch.stack([mean_of_tokens(each.float(), mask) for each in seen], 1)


def teacher_outputs(
    device: Device, taught: Taught, plan: Sequence[np.ndarray]
) -> TeacherOutputs | TokenOutputs:
    """What the teacher says about all rows of a plan of batches; charged to the device.

    The base must be fitted again afterwards.
    """
    base, rows = device.base, np.unique(np.concatenate(plan))
    data, model = device.data.take(rows), taught.teacher
    outputs: list[Tensor] = []
    hidden: list[Tensor] = []
    seen: list[np.ndarray] = []
    with torch.no_grad(), Hidden(base, taught.teaching.hidden > 0) as states:
        # merged, quantised weights would all be whole at once
        merge = base.layout.held_bits is None
        module = base.fit(model.to(base.device), merge=merge)
        backbone = base.skeleton.get_submodule(base.layout.prefix)
        for chosen in data.batches_by_length(BATCH):
            batch = moved(data.batch(chosen), base.device)
            inputs, mask = module_inputs(batch), batch["attention_mask"]
            if base.head:
                outputs.append(module(**inputs).logits.float())
            else:  # row after row, without padding
                outputs.append(backbone(**inputs).last_hidden_state[mask.bool()])
            hidden.append(states.take(mask, len(chosen)))
            seen.append(chosen)
    came = np.concatenate(seen)
    place = np.full(len(device.data), -1)
    place[rows[came]] = np.arange(len(rows))
    charge(device, taught, rows)
    if base.head:
        return TeacherOutputs(place, torch.cat(outputs), torch.cat(hidden))
    lengths = data.lengths[came]
    starts = np.full(len(device.data), -1)
    starts[rows[came]] = np.cumsum(lengths) - lengths
    output = base.skeleton.get_output_embeddings()
    return TokenOutputs(place, starts, torch.cat(outputs), output, torch.cat(hidden))


def charge(device: Device, taught: Taught, rows: np.ndarray) -> None:
    """What it costs a device that the teacher reads these of its rows, each once."""
    base, data = device.base, device.data.take(rows)
    sizes = [(len(chosen), data.width(chosen)) for chosen in data.batches_by_length(BATCH)]
    rank = adapter_rank(taught.teacher.adapter)
    extent = Extent(
        tokens=sum(count * width for count, width in sizes),
        squared_tokens=sum(count * width**2 for count, width in sizes),
    )
    longest = max(width for _, width in sizes)
    device.spend(
        flops=teaching_flops(base.layout, rank, extent),
        launches=len(sizes) * base.layout.layers,
        memory_bytes=teaching_memory_bytes(
            base.layout, rank, embeddings=base.embeddings, rows=BATCH, tokens=longest
        ),
    )


class Teachers:
    """The teachers of models that are trained in one pass, one for each or none for all; a context
    manager, since it hooks the blocks of the base where hidden states count.

    They run before training begins, over all rows of each one's plan of batches. Their weights and
    temperatures must agree.
    """

    def __init__(
        self, base: Base, taught: Sequence[tuple[Device, Taught, Sequence[np.ndarray]]]
    ) -> None:
        self._outputs = [teacher_outputs(device, teacher, plan) for device, teacher, plan in taught]
        self._teaching = taught[0][1].teaching if taught else None
        self._states = Hidden(base, self._teaching is not None and self._teaching.hidden > 0)

    def __enter__(self) -> "Teachers":
        self._states.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._states.__exit__(*error)

    def loss(
        self,
        loss: Float[Tensor, " models"],
        logits: Tensor,
        inputs: Tensors,
        rows: Sequence[np.ndarray],
    ) -> Float[Tensor, " models"]:
        """What each model minimises: of its loss on the labels of its `rows`, and of how far its
        `logits` and the hidden states of the last pass are from its teacher's.
        """
        how = self._teaching
        if how is None:
            return loss
        models = len(self._outputs)
        each = zip(
            self._outputs,
            logits.chunk(models),
            inputs["labels"].chunk(models),
            rows,
            strict=True,
        )
        apart = [
            _distance(outputs, answers, labels, chosen, how.temperature)
            for outputs, answers, labels, chosen in each
        ]
        whole = (1 - how.weight) * loss + how.weight * torch.stack(apart)
        if how.hidden:
            seen = self._states.take(inputs["attention_mask"], len(logits))
            taught = [
                outputs.hidden[torch.from_numpy(outputs.place[chosen]).to(logits.device)]
                for outputs, chosen in zip(self._outputs, rows, strict=True)
            ]
            whole = whole + how.hidden * hidden_distances(seen, torch.cat(taught), models)
        return whole


def _distance(
    outputs: TeacherOutputs | TokenOutputs,
    logits: Tensor,
    labels: Tensor,
    rows: np.ndarray,
    temperature: float,
) -> Float[Tensor, ""]:
    """How far a model's logits of these rows are from its teacher's."""
    match outputs:
        case TeacherOutputs():
            return distances(logits, outputs.of(rows)[0], temperature, 1)[0]
        case TokenOutputs():
            return outputs.distance(logits, labels, rows, temperature)


def distances(
    logits: Float[Tensor, "rows classes"],
    taught: Float[Tensor, "rows classes"],
    temperature: float,
    models: int,
) -> Float[Tensor, " models"]:
    """temperature^2 KL(teacher || student) of both at this temperature, in nats, the mean over each
    model's rows; the square keeps the size of its gradient, as in the source.

    >>> same = torch.tensor([[1.0, 2.0]])
    >>> distances(same, same, 2.0, 1)
    tensor([0.])
    """
    student = nn.functional.log_softmax(logits.float() / temperature, -1)
    teacher = nn.functional.log_softmax(taught / temperature, -1)
    each = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature**2 * each.view(models, -1).mean(1)


def hidden_distances(
    states: Float[Tensor, "rows blocks width"],
    taught: Float[Tensor, "rows blocks width"],
    models: int,
) -> Float[Tensor, " models"]:
    """The mean squared distance over each model's rows, blocks and entries."""
    return (states - taught).square().view(models, -1).mean(1)
