"""Local training: adapter and task head on one device's rows, with a fresh optimiser each time,
unless the order has the device keep its own (`lm.held`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedspine.control.labels import class_log_ratios, distribution
from fedspine.core.device import Device
from fedspine.core.message import Tensors
from fedspine.core.noise import MOST_LOSS, noise_like, noisy_update
from fedspine.core.privacy import Guard
from fedspine.core.reads import largest_share, last_steps
from fedspine.core.task import IGNORED, Examples
from fedspine.core.tensors import moved
from fedspine.lm.attention import module_inputs
from fedspine.lm.base import Model
from fedspine.lm.distillation import Taught, Teachers
from fedspine.lm.held import begun, penalty_of, remember
from fedspine.lm.importance import Scores
from fedspine.lm.importance_tracker import ImportanceTracker, Scoring
from fedspine.lm.per_row import RowGradients, poisson_batches
from fedspine.lm.prefix import activations, entering, first_block, name_of
from fedspine.lm.request import Request, TuneResult
from fedspine.lm.stored import Quantised, Stored
from fedspine.lm.trainable_stack import TrainableStack
from fedspine.lm.training_account import account, account_rows
from fedspine.lm.tuning import AdjustedTuning, HeldTuning, Tuning

LAST = 5  # steps whose mean loss stands for where training ended


def tune(
    device: Device,
    model: Model,
    tuning: Tuning,
    *,
    scoring: Scoring | None = None,
    scores: Scores | None = None,
    penalty: Callable[[Tensors], Tensor] | None = None,
    lowest: int = 0,
    freeze_a: bool = False,
    taught: Taught | None = None,
    change: dict[str, Tensor] | None = None,
    blocks: tuple[int, ...] | None = None,
    quantised: Quantised | None = None,
) -> TuneResult:
    """Train `model` for `tuning.steps` optimiser steps on the device's rows.

    Adapters below the block `lowest` take part as they are, and so do those of other than `blocks`,
    where these are given. `penalty` of the adapter and the head, by name, is added to what is
    minimised, and so is the distance to the teacher of `taught`; the loss that is returned is that
    of the labels. `change`, times the model's scale, is added to the base's weights, named
    `<path>.weight`, and frozen like them. Blocks keep what the backward pass reads as `quantised`
    says. A loss that is not finite ends training at once and is returned as it is; the server
    leaves such a reply out.

    The model that is returned may leave the device: it has the noise of the device, and keeps the
    promise of the run; raises BudgetExceeded where the device's budget does not suffice.
    """
    request = Request(
        device=device,
        model=model,
        tuning=tuning,
        scoring=scoring,
        scores=scores,
        penalty=penalty,
        lowest=lowest if blocks is None else min(blocks),
        freeze_a=freeze_a,
        taught=taught,
        blocks=blocks,
        change=change,
        quantised=quantised,
    )
    rows = None
    if device.privacy is not None:
        result = _tuned_privately(request, device.privacy)
        rows = min(len(device.data), tuning.steps * tuning.batch)  # how many it drew is private
    elif isinstance(tuning, HeldTuning):
        result = _tuned_held(request, tuning)
    else:
        result = _tuned(request)
    tuned = result.model.adapter | result.model.head
    released = device.released(model.adapter | model.head, tuned, rows)
    return replace(result, model=_with_weights(result.model, released))


def _tuned(request: Request) -> TuneResult:
    trainer = request.device.trainer
    return train([request])[0] if trainer is None else trainer(request)


def _tuned_held(request: Request, how: HeldTuning) -> TuneResult:
    """Training with what the device has kept; it keeps nothing of one that was not finite."""
    device = request.device
    held = begun(device, request.model, how)
    result = _tuned(
        replace(
            request,
            model=held.model,
            penalty=penalty_of(held, how, request.penalty, device.base.device),
            moments=held.moments,
            keeps_moments=how.keep_optimiser,
            extra_bytes=held.extra_bytes,
            step_flops=held.step_flops,
        )
    )
    if result.loss is not None and np.isfinite(result.loss):
        remember(device, held, how, result.model, result.moments)
    return result


def _tuned_privately(request: Request, guard: Guard) -> TuneResult:
    if isinstance(request.tuning, HeldTuning):
        raise ValueError("what a device keeps between rounds is not counted by its ledger")
    if not (request.scoring is request.penalty is request.taught is request.change is None):
        raise ValueError("importance, penalties and teachers have no noise, so none may be asked")
    match guard.terms.level:
        case "rows":
            return _by_dp_sgd(request, guard)
        case "devices":
            multiplier = guard.spend(rate=1.0, steps=1)
            tuned, sent = _tuned(request).model, request.model
            before, after = sent.adapter | sent.head, tuned.adapter | tuned.head
            stack = _stacked([request])
            values = stack.adapter | stack.head
            trained = {n: before[n] for n, value in values.items() if value.requires_grad}
            released = before | noisy_update(trained, after, guard, multiplier)
            return TuneResult(_with_weights(sent, released), None, None)


def _by_dp_sgd(request: Request, guard: Guard) -> TuneResult:
    """Row level: noisy sums of clipped gradients of single rows, in batches of random size."""
    device, tuning, model = request.device, request.tuning, request.model
    base, data, draws, clip = device.base, device.data, guard.draws, guard.terms.clip
    rate = min(1.0, tuning.batch / len(data))
    multiplier = guard.spend(rate, tuning.steps)
    first = first_block(base.layout, model)
    stored = _stored_prefix(request, first)
    stack = _stacked([request])
    optimiser = _optimiser(stack, tuning)
    values = stack.adapter | stack.head
    gradients = RowGradients(
        base=base,
        model=model,
        names=[name for name, tensor in values.items() if tensor.requires_grad],
        data=data,
        losses_of=losses_of,
        first=first,
        stored=stored,
    )
    steps = []
    for rows in poisson_batches(len(data), rate, tuning.steps, draws):
        steps.append(gradients.extent(rows))
        for name, total in gradients.clipped_sum(values, rows, clip).items():
            noise = multiplier * clip * noise_like(total, draws)
            # the expected size of a batch, since its true size tells who is in it
            values[name].grad = (total + noise) / (rate * len(data))
        optimiser.step()
    account_rows(request, gradients, steps, max(first, request.lowest))
    return TuneResult(stack.model(0), None, None)


def _with_weights(model: Model, tensors: Tensors) -> Model:
    """The model with these values of its adapter and its head."""
    return replace(
        model,
        adapter={name: tensors[name] for name in model.adapter},
        head={name: tensors[name] for name in model.head},
    )


def train(requests: Sequence[Request]) -> list[TuneResult]:
    """Train the models of all requests in one pass each step; they must agree in all but device,
    sizes and weights.

    Together or one after another gives the same but for rounding: sums run over other shapes.
    """
    lead, alone = requests[0], len(requests) == 1
    base, tuning, scoring = lead.device.base, lead.tuning, lead.scoring
    first = first_block(base.layout, lead.model)
    prefixes = [_stored_prefix(request, first) for request in requests]
    plans = [list(batches(r.device.data, tuning, r.device.rng)) for r in requests]
    taught = ((r.device, r.taught, plan) for r, plan in zip(requests, plans, strict=True))
    teachers = Teachers(base, [each for each in taught if each[1] is not None])
    stack = _stacked(requests)
    module = stack.fit()
    if lead.change is not None:
        base.add(lead.change, lead.model.scale)
    entry = base.start_at(first) if prefixes[0] is not None else None
    optimiser = _optimiser(stack, tuning)
    if lead.moments is not None:
        stack.go_on(optimiser, [request.moments for request in requests])
    losses: list[Float[Tensor, " models"]] = []
    # to which each device pads each of its batches, and its rows with a label that counts
    widths: list[list[int]] = [[] for _ in requests]
    counted: list[list[np.ndarray]] = [[] for _ in requests]
    known = [request.scores for request in requests]
    noisy = lead.device.noise is not None
    skews = _label_skews(requests)
    stored = nullcontext() if lead.quantised is None else Stored(base, lead.quantised)
    with teachers, stored, ImportanceTracker(stack, scoring, known) as tracker:
        for step, rows in enumerate(zip(*plans, strict=True)):
            inputs, width = _joined_inputs(requests, rows, widths)
            for request, chosen, seen in zip(requests, rows, counted, strict=True):
                request.device.uses(chosen)
                seen.append(chosen[request.device.data.predicted(chosen) > 0])
            if entry is not None:
                entry.hidden = _all_entering(requests, prefixes, rows, width)
            tracker.before_forward(step, inputs["attention_mask"])
            logits = logits_of(module, inputs)
            every = label_losses(logits, inputs["labels"])
            loss = mean_losses(every, inputs["labels"], len(requests))
            losses.append(_bounded(every, loss, inputs["labels"]) if noisy else loss.detach())
            # in a private run not even that training failed may show
            if alone and lead.device.privacy is None and not torch.isfinite(loss):
                break
            penalties = [
                r.penalty(stack.adapter_of(i) | stack.head_of(i))
                for i, r in enumerate(requests)
                if r.penalty is not None
            ]
            if skews is not None:
                adjusted = logits + skews.repeat_interleave(len(rows[0]), 0)
                loss = losses_of_logits(adjusted, inputs["labels"], len(requests))
            loss = teachers.loss(loss, logits, inputs, rows)
            sum(penalties, start=loss.sum()).backward()
            tracker.update(step)
            stack.clip(tuning.clip)
            optimiser.step()
            optimiser.zero_grad()
    history = torch.stack(losses, 1).tolist()
    for request, padded, seen in zip(requests, widths, history, strict=True):
        account(request, padded[: _steps_done(seen)], first)
    return [
        TuneResult(
            stack.model(i),
            _final_loss(seen, counted[i], requests[i].device),
            tracker.scores[i],
            stack.moments(i, optimiser) if requests[i].keeps_moments else None,
        )
        for i, seen in enumerate(history)
    ]


def _all_entering(
    requests: Sequence[Request],
    prefixes: Sequence[Tensor | None],
    rows: Sequence[np.ndarray],
    width: int,
) -> Tensor:
    """What enters the lowest trained block for one step's rows of all devices."""
    parts = zip(requests, prefixes, rows, strict=True)
    return torch.cat(
        [
            entering(r.device.base, r.device.data, stored, chosen, width)
            for r, stored, chosen in parts
        ]
    )


def _bounded(
    every: Float[Tensor, " labels"], loss: Float[Tensor, " models"], labels: Tensor
) -> Float[Tensor, " models"]:
    """The mean losses that a device with noise tells: of labels' losses up to MOST_LOSS, or as they
    are where one is not finite.
    """
    shown = mean_losses(every.detach().clamp(max=MOST_LOSS), labels, len(loss))
    return torch.where(loss.isfinite(), shown, loss.detach())


def _stacked(requests: Sequence[Request]) -> TrainableStack:
    """The models of requests that agree, with what they freeze."""
    lead = requests[0]
    stack = TrainableStack(lead.device.base, [request.model for request in requests])
    stack.freeze_but(lead.trained)
    if lead.freeze_a:
        stack.freeze_a()
    return stack


def _optimiser(stack: TrainableStack, tuning: Tuning) -> torch.optim.Optimizer:
    groups = [
        {"params": list(stack.adapter.values()), "lr": tuning.learning_rate},
        {
            "params": list(stack.head.values()),
            "lr": tuning.head_learning_rate or tuning.learning_rate,
        },
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], weight_decay=tuning.weight_decay, fused=True
    )


def _steps_done(losses: list[float]) -> int:
    """Steps until training ended: all, or up to the first loss that is not finite."""
    return next(
        (step + 1 for step, loss in enumerate(losses) if not np.isfinite(loss)), len(losses)
    )


def _final_loss(losses: list[float], counted: list[np.ndarray], device: Device) -> float:
    """The mean of the last losses before training ended, which is not finite where one of them is
    not.

    Steps in which no label counted say nothing; 0 where there are no others. It is over more steps
    where the last ones have fewer rows than the device answers about.
    """
    steps = zip(losses[: _steps_done(losses)], counted, strict=False)
    counting = [(loss, rows) for loss, rows in steps if len(rows) or not np.isfinite(loss)]
    if not counting:
        return 0.0
    texts = [device.data.texts_of(rows) for _, rows in counting]
    last = last_steps(texts, LAST, device.fewest_rows)
    mean = float(np.mean([loss for loss, _ in counting][-last:]))
    if device.noise is None or not np.isfinite(mean):
        return mean
    labels = [device.data.predicted(rows) for _, rows in counting[-last:]]
    return device.mean_beside(mean, MOST_LOSS * largest_share(texts[-last:], labels))


def _stored_prefix(request: Request, first: int) -> Tensor | None:
    """What enters the lowest trained block for all of the device's rows, where that pays."""
    device = request.device
    if first == 0 or not request.reuses:
        return None

    def make() -> Tensor:
        return activations(device.base, request.model, device.data, first)

    if device.prefixes is None:
        return make()
    return device.prefixes.get(name_of(device.id, first, request.model.structure), make)


def _label_skews(requests: Sequence[Request]) -> Float[Tensor, "models classes"] | None:
    """What is added to the logits of each device's rows, by its shares of the labels against equal
    ones, since it does not know the fleet's; None where nothing is.
    """
    base, tuning = requests[0].device.base, requests[0].tuning
    if not isinstance(tuning, AdjustedTuning):
        return None
    classes = base.config.num_labels
    known = np.stack([distribution(each.device.data.labels, classes) for each in requests])
    with np.errstate(divide="ignore"):  # at a share of 1, of classes that the device lacks
        ratios = class_log_ratios(known, np.full(classes, 1 / classes), tuning.skew_share)
    return torch.from_numpy(ratios).float().to(base.device)


def losses_of(module: nn.Module, inputs: Tensors, models: int) -> Float[Tensor, " models"]:
    """Mean cross-entropy of each model's rows: per row for classification, per predicted token for
    language models.

    0 for a model of whose labels none counts, such as rows of one token.
    """
    return losses_of_logits(logits_of(module, inputs), inputs["labels"], models)


def losses_of_logits(logits: Tensor, labels: Tensor, models: int) -> Float[Tensor, " models"]:
    """The same of logits that are known."""
    return mean_losses(label_losses(logits, labels), labels, models)


def logits_of(module: nn.Module, inputs: Tensors) -> Tensor:
    """What a module answers to a batch."""
    return module(**module_inputs(inputs)).logits


def label_losses(logits: Tensor, labels: Tensor) -> Float[Tensor, " labels"]:
    """The cross-entropy of each label, 0 of one that does not count."""
    if labels.dim() == 2:
        logits = logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(
        logits.float(), _predicted_labels(labels), ignore_index=IGNORED, reduction="none"
    )


def mean_losses(losses: Tensor, labels: Tensor, models: int) -> Float[Tensor, " models"]:
    """The mean of each model's own over the labels that count."""
    each = (models, len(losses) // models)
    counted = (_predicted_labels(labels) != IGNORED).view(each).sum(1)
    return losses.view(each).sum(1) / counted.clamp(min=1)


def _predicted_labels(labels: Tensor) -> Tensor:
    """Labels as predictions: of texts of each token but the first."""
    return labels[:, 1:].flatten() if labels.dim() == 2 else labels


def batches(data: Examples, tuning: Tuning, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows for each step: whole passes over shuffled data, cut into batches of like length in
    random order.
    """
    wanted = tuning.steps * tuning.batch
    passes = [rng.permutation(len(data)) for _ in range(-(-wanted // len(data)))]
    rows = np.concatenate(passes)[:wanted]
    by_length = rows[np.argsort(data.lengths[rows], kind="stable")]
    for start in rng.permutation(tuning.steps) * tuning.batch:
        yield by_length[start : start + tuning.batch]


def _joined_inputs(
    requests: Sequence[Request], rows: Sequence[np.ndarray], widths: Sequence[list[int]]
) -> tuple[Tensors, int]:
    """One step's inputs of all devices, one after another, and their common padded length; each
    one's own is noted.
    """
    for request, chosen, seen in zip(requests, rows, widths, strict=True):
        seen.append(request.device.data.width(chosen))
    width = max(seen[-1] for seen in widths)
    parts = [
        request.device.data.batch(chosen, width)
        for request, chosen in zip(requests, rows, strict=True)
    ]
    inputs = (
        parts[0]
        if len(parts) == 1
        else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    )
    return moved(inputs, requests[0].device.base.device), width
