"""The trainable tensors: adapter and head of one model, or of several stacked to be trained in one
pass.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedspine.core.message import Tensors
from fedspine.core.tensors import padded
from fedspine.lm.base import Base, Model
from fedspine.lm.frozen import expanded
from fedspine.lm.held import AdamMoments
from fedspine.lm.importance import Criterion, Scores, score_stack, unit_roots
from fedspine.lm.lora import a_name, b_name, is_a
from fedspine.lm.prunable_layout import PrunableSite


class TrainableStack:
    """Trainable copies of the models' adapters and heads, on the base's device.

    A single model's tensors keep their shapes. Several models are stacked and padded with zeros to
    the largest rank and structure: a padded unit has no output and gets no gradient, so it stays
    zero.
    """

    def __init__(self, base: Base, models: Sequence[Model]) -> None:
        self._base, self._models = base, models
        self.adapter = self._stacked_weights([model.adapter for model in models])
        self.head = self._stacked_weights([model.head for model in models])

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, the adapter's first."""
        return [*self.adapter.values(), *self.head.values()]

    def freeze_but(self, blocks: Collection[int]) -> None:
        """Train adapters of these blocks only; nothing is propagated back below the lowest."""
        for site in self._base.layout.sites:
            if site.layer not in blocks and a_name(site.path) in self.adapter:
                self.adapter[a_name(site.path)].requires_grad_(False)
                self.adapter[b_name(site.path)].requires_grad_(False)

    def freeze_a(self) -> None:
        """Train no A factor."""
        for name, factor in self.adapter.items():
            if is_a(name):
                factor.requires_grad_(False)

    def fit(self) -> nn.Module:
        """The module that computes with these tensors, until the base is fitted again."""
        lead = self._models[0]
        if len(self._models) == 1:
            return self._base.fit(
                Model(
                    structure=lead.structure, adapter=self.adapter, head=self.head, scale=lead.scale
                )
            )
        return self._base.fit_stack(
            [m.structure for m in self._models], self.adapter, self.head, lead.scale
        )

    def clip(self, most: float) -> None:
        """Scale each model's gradient down to the norm `most` where it is larger."""
        if len(self._models) == 1:
            nn.utils.clip_grad_norm_(self.tensors, most)
            return
        gradients = [tensor.grad for tensor in self.tensors if tensor.grad is not None]
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients])
        factors = (most / (squares.sum(0).sqrt() + 1e-6)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))

    def model(self, i: int) -> Model:
        """Model i as it is now, in its own shapes, on the CPU; it shares memory with the stack
        where possible.
        """
        lead = self._models[i]
        return Model(
            structure=lead.structure,
            adapter={name: tensor.detach().cpu() for name, tensor in self.adapter_of(i).items()},
            head={name: tensor.detach().cpu() for name, tensor in self.head_of(i).items()},
            scale=lead.scale,
        )

    def adapter_of(self, i: int) -> Tensors:
        """Model i's adapter in its own shapes; it stays in the autograd graph."""
        lead = self._models[i]
        return {
            name: self._part_of_model(i, tensor, lead.adapter[name])
            for name, tensor in self.adapter.items()
        }

    def head_of(self, i: int) -> Tensors:
        """Model i's head, likewise."""
        lead = self._models[i]
        return {
            name: self._part_of_model(i, tensor, lead.head[name])
            for name, tensor in self.head.items()
        }

    def go_on(self, optimiser: torch.optim.Optimizer, of_models: Sequence[AdamMoments]) -> None:
        """Let AdamW go on with each model's moments, which are of as many steps."""
        steps = float(of_models[0].steps)
        for name in of_models[0].first:
            tensor = self.adapter[name] if name in self.adapter else self.head[name]
            kinds = ([m.first[name] for m in of_models], [m.second[name] for m in of_models])
            first, second = (
                (each[0].clone() if len(each) == 1 else padded(each)).to(tensor.device)
                for each in kinds
            )
            optimiser.state[tensor] = {
                "step": torch.tensor(steps, device=tensor.device),
                "exp_avg": first,
                "exp_avg_sq": second,
            }

    def moments(self, i: int, optimiser: torch.optim.Optimizer) -> AdamMoments:
        """Model i's moments in AdamW, in its own shapes, on the CPU."""
        lead, first, second, steps = self._models[i], {}, {}, 0
        whole = {**lead.adapter, **lead.head}
        for name, tensor in {**self.adapter, **self.head}.items():
            if state := optimiser.state.get(tensor):
                first[name], second[name] = (
                    self._part_of_model(i, state[kind], whole[name]).detach().cpu().clone()
                    for kind in ("exp_avg", "exp_avg_sq")
                )
                steps = int(state["step"])
        return AdamMoments(first=first, second=second, steps=steps)

    def importance(self, criterion: Criterion) -> list[Scores]:
        """Each model's importance after a backward pass, while the base fits these models."""
        structures = [model.structure for model in self._models]
        weights = self._base.fitted_weights()
        return score_stack(
            self._base.layout, structures, weights, self.adapter, self._models[0].scale, criterion
        )

    def importance_by_output(self, squares: Tensors) -> list[Scores]:
        """Each model's importance by what its units add to the output of their layers; `squares` by
        path of the `readers`, [models, columns], is the mean square of what entered each column in
        a forward pass.
        """
        weights = self._base.fitted_weights()
        lines = {}
        with torch.no_grad():
            for site, _ in self.readers():
                a, b = self.adapter[a_name(site.path)], self.adapter[b_name(site.path)]
                effective = (b @ a).mul_(self._models[0].scale)
                effective = effective.add_(expanded(weights[site.path]))
                lines[site.path] = effective.square_().sum(-2) * squares[site.path]
        return self.importance_by_gate(lines)

    def importance_by_gate(self, lines: Tensors) -> list[Scores]:
        """Each model's importance, where a unit's is the root of the sum of its columns' `lines`,
        by path of the `readers`, [models, columns]; each layer is scaled to unit norm.
        """
        layout = self._base.layout
        return [
            unit_roots(layout, m.structure, {p: line[i] for p, line in lines.items()})
            for i, m in enumerate(self._models)
        ]

    def readers(self) -> Iterator[tuple[PrunableSite, nn.Module]]:
        """The layers whose inputs are units' outputs, so that their columns are units."""
        for site in self._base.layout.sites:
            if site.column_units:
                yield site, self._base.skeleton.get_submodule(site.path)

    def _stacked_weights(self, of_models: list[Tensors]) -> Tensors:
        joined = {}
        for name, tensor in of_models[0].items():
            parts = [tensors[name] for tensors in of_models]
            whole = tensor.detach().clone() if len(parts) == 1 else padded(parts)
            joined[name] = whole.to(self._base.device).requires_grad_()
        return joined

    def _part_of_model(self, i: int, tensor: Tensor, like: Tensor) -> Tensor:
        return (
            tensor
            if len(self._models) == 1
            else tensor[i][tuple(slice(size) for size in like.shape)]
        )
