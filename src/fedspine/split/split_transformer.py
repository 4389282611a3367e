"""A transformer cut at a block boundary: embeddings and the first blocks on devices, the others and
the head on the server.

Section 12 of the MergeSFL reconstruction (arXiv:2311.13348 carried over to LoRA). Both halves train
the LoRA factors of their blocks, the server model the task head too; layer norms do not depend on
the batch, so merging does not change a row.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors
from fedspine.core.task import IGNORED
from fedspine.core.tensors import moved
from fedspine.lm.base import Base, Model
from fedspine.lm.cost import HALF, Extent, training_flops, training_memory_bytes
from fedspine.lm.lora import a_name, b_name, fresh
from fedspine.lm.prunable_layout import PrunableLayout
from fedspine.lm.structure import full
from fedspine.split.interface import Features, Losses, adjusted_losses


class SplitTransformer:
    """`SplitModel` of a transformer with adapters of one rank on all linear layers of its blocks.

    Raises BadInput for a bi-encoder, and for a cut outside the model: 0 leaves the embeddings alone
    to the devices, which then train nothing; with all blocks below the cut the server has the head.
    """

    def __init__(self, base: Base, cut: int, rank: int, scale: float) -> None:
        layers = base.layout.layers
        if base.pooling == "bi-encoder":
            raise BadInput(
                'task.pooling is "bi-encoder", but features of split learning do not say which '
                'text of a pair a token is of; set it to "mean"'
            )
        if not 0 <= cut <= layers:
            raise BadInput(
                f"the cut is after block {cut}, but this model "
                f"has {layers} blocks; choose 0 to {layers}"
            )
        self._base, self._cut, self._rank, self._scale = base, cut, rank, scale
        self._structure = full(base.layout)
        names = [
            (site.layer, name(site.path)) for site in base.layout.sites for name in (a_name, b_name)
        ]
        self._factors = [name for _, name in names]
        self._below = frozenset(name for layer, name in names if layer < cut)
        self.entry = frozenset(name for layer, name in names if layer == cut)
        layouts = {
            "client": replace(base.layout, layers=cut),
            "server": replace(base.layout, layers=layers - cut),
        }
        self._layouts: dict[str, PrunableLayout] = layouts
        # an exchange asks for costs several times, always the same few
        self.flops = cache(self.flops)  # type: ignore[method-assign]
        self.memory_bytes = cache(self.memory_bytes)  # type: ignore[method-assign]
        # the client model has no head, but the skeleton needs one
        self._no_head: Tensors = {}
        for layer in base.head:
            self._no_head |= layer.tensors

    @property
    def statistics(self) -> frozenset[str]:
        """None: all weights are trained."""
        return frozenset()

    @property
    def ends(self) -> frozenset[str]:
        """The task head; a language model's is frozen."""
        return frozenset(self._no_head)

    def start(self, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        """An adapter that changes nothing yet and the task head; together the same wherever the cut
        is.
        """
        adapter = fresh(self._base.layout.sites, self._rank, rng)
        return self._split({**adapter, **self._base.initial_head(rng)})

    def client_forward(self, weights: Tensors, inputs: Tensors, *, seed: int | None) -> Features:
        """The hidden states [rows, tokens, width] that enter block `cut`."""
        self._fit(weights)
        inputs = moved(
            {name: tensor for name, tensor in inputs.items() if name != "labels"}, self._base.device
        )
        return Features(
            values=self._base.through(0, self._cut, inputs), mask=inputs["attention_mask"].bool()
        )

    def server_forward(
        self,
        weights: Tensors,
        features: Features,
        labels: Tensor,
        *,
        seed: int | None,
        adjustments: Tensor | None = None,
    ) -> Losses:
        """Cross-entropy in nats, of each row's class or of all its next tokens."""
        return self._loss(self._cut, weights, features, labels, adjustments)

    def middle_forward(self, weights: Tensors, features: Features, *, seed: int | None) -> Features:
        """The hidden states that leave the last block."""
        self._fit(weights)
        values = self._base.through(
            self._cut, self._base.layout.layers, self._inputs(features), self._hidden(features)
        )
        return Features(values=values, mask=features.mask)

    def ending_forward(
        self, weights: Tensors, features: Features, labels: Tensor, *, seed: int | None
    ) -> Losses:
        """As `server_forward`, for the output of the last block."""
        return self._loss(self._base.layout.layers, weights, features, labels)

    def join(self, client_model: Tensors, server_model: Tensors) -> Model:
        """The whole model, on the full structure."""
        weights = {**client_model, **server_model}
        return Model(
            structure=self._structure,
            adapter={name: weights[name] for name in self._factors},
            head={name: weights[name] for name in self._no_head},
            scale=self._scale,
        )

    def parts(self, model: Model) -> tuple[Tensors, Tensors]:
        """The two halves of a model on the full structure."""
        return self._split({**model.adapter, **model.head})

    def flops(self, half: str, rows: int, tokens: int) -> float:
        """As `training_flops` of the half's blocks; embeddings and head are left out there too."""
        if not (layout := self._layouts[half]).layers:
            return 0.0
        extent = Extent(tokens=rows * tokens, squared_tokens=rows * tokens**2)
        return training_flops(layout, full(layout), self._rank, extent)

    def memory_bytes(self, half: str, rows: int, tokens: int) -> int:
        """As `training_memory_bytes`; the client model has the embeddings, of which nothing is kept
        for a backward pass.
        """
        layout = self._layouts[half]
        embeddings = self._base.embeddings if half == "client" else 0
        if not layout.layers:
            return HALF * embeddings
        return training_memory_bytes(
            layout,
            full(layout),
            rank=self._rank,
            embeddings=embeddings,
            batch=rows,
            tokens=tokens,
        )

    def launches(self, half: str) -> int:
        """Blocks of the half."""
        return self._layouts[half].layers

    def feature_shape(self, tokens: int) -> tuple[int, ...]:
        """Tokens and the width of the residual stream."""
        return tokens, self._base.layout.width

    def _split(self, weights: Tensors) -> tuple[Tensors, Tensors]:
        client_model = {name: tensor for name, tensor in weights.items() if name in self._below}
        return client_model, {
            name: tensor for name, tensor in weights.items() if name not in self._below
        }

    def _fit(self, weights: Tensors) -> nn.Module:
        """The skeleton with these weights; blocks whose factors are not among them are the base's
        own.
        """
        adapter = {name: tensor for name, tensor in weights.items() if name not in self._no_head}
        head = {name: weights.get(name, tensor) for name, tensor in self._no_head.items()}
        model = Model(structure=self._structure, adapter=adapter, head=head, scale=self._scale)
        return self._base.fit(model.to(self._base.device))

    def _loss(
        self,
        first: int,
        weights: Tensors,
        features: Features,
        labels: Tensor,
        adjustments: Tensor | None = None,
    ) -> Losses:
        module = self._fit(weights)
        self._base.start_at(first).hidden = self._hidden(features)
        logits = module(**self._inputs(features)).logits
        labels = labels.to(logits.device)
        if labels.dim() == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.float().movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none"
        )
        rows = len(labels)
        return Losses(
            total=losses.view(rows, labels[0].numel()).sum(1),
            counted=(labels != IGNORED).view(rows, labels[0].numel()).sum(1),
            adjusted=adjusted_losses(logits, labels, adjustments),
        )

    def _hidden(self, features: Features) -> Tensor:
        return features.values.to(self._base.device, self._base.precision)

    def _inputs(self, features: Features) -> Tensors:
        """The skeleton's inputs besides hidden states: ids that only mark which positions are
        tokens.
        """
        assert features.mask is not None
        inside = features.mask.to(self._base.device)
        padding = self._base.config.pad_token_id
        token = 1 if padding == 0 else 0
        return {"input_ids": torch.where(inside, token, padding), "attention_mask": inside.long()}
