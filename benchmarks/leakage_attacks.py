"""The attacks of leakage.py, one function each. Each gets what left a device and what a server
knows anyway: base, order, and public rows of the same kind as the device's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedspine.core.task import Examples
from fedspine.lm.base import Base, Model
from fedspine.lm.structure import full

CHUNK = 1024  # tokens of the vocabulary at a time
# An update of AdamW's first step is the sign of the gradient. Of a normal variable's sign 2/pi of
# the power is the variable, the rest is noise (Bussgang 1952).
SIGN_NOISE = (1 - 2 / np.pi) / (2 / np.pi)
# share of a layer's width: a span that holds this much says too little about what is in it
NEARLY = 0.9
FP16_STEP = 2.0**-11  # of a number, relative
RIDGES = (1.0, 10.0, 100.0, 1000.0)


# --- labels ---


def labels_by_sign(bias: Tensor, prior: np.ndarray, rows: int) -> np.ndarray:
    """Expected rows of each class, float64 [classes], from the signs of the bias's gradient.

    iDLG (Zhao et al. 2020, arXiv:2001.02610): only a class with more labels than the model expects
    has a negative gradient. Of one row that is its class.
    """
    held = np.where(bias.numpy() < 0, prior + 1e-9, 0.0)
    return rows * (prior if not held.any() else held / held.sum())


def labels_by_counts(
    bias: Tensor, loss: float, doubt: float, rows: int, favoured: int = 0
) -> np.ndarray:
    """Rows of each class, float64 [classes], exact: the answer to `for_labels`.

    The gradient is k (p - q) with p known and q the shares; the loss gives q of the favoured class,
    and with it k.
    """
    logits = torch.full_like(bias, -doubt)
    logits[favoured] = 0.0
    p = logits.double().softmax(0).numpy()
    gradient = bias.double().numpy()
    sure = float(np.clip((-np.log(np.delete(p, favoured)[0]) - loss) / doubt, 0, 1))
    others = np.arange(len(p)) != favoured
    if sure >= p[favoured]:  # all rows are of the favoured class
        return rows * (~others).astype(float)
    factor = gradient[others].sum() / (sure - p[favoured])
    q = np.where(others, np.clip(p - gradient / factor, 0, 1), sure)
    return rows * q / q.sum()


def class_features(head: Tensor, counts: np.ndarray, favoured: int = 0) -> list[Tensor]:
    """The direction of the mean features of each class of which there are rows, [width] each."""
    return [-head[c] for c in np.flatnonzero(counts > 0.5) if c != favoured]


def signed_features(bias: Tensor, head: Tensor) -> list[Tensor]:
    """The signs of the features of the classes that labels came from, [width] each."""
    return [torch.sign(-row) for row in head[bias < 0]]


# --- tokens ---


@dataclass
class Vocabulary:
    """The embeddings of every token at every place, fp32 [tokens, places, width]."""

    embedded: Tensor
    known: tuple[int, ...]  # tokens in every text
    whitened: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Base, places: int, known: Sequence[int]) -> "Vocabulary":
        head = base.initial_head(np.random.default_rng(0))
        base.fit(Model(structure=full(base.layout), adapter={}, head=head, scale=1.0))
        tokens, parts = base.config.vocab_size, []
        for start in range(0, tokens, CHUNK):
            ids = torch.arange(start, min(start + CHUNK, tokens))[:, None].expand(-1, places)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            parts.append(base.below(0, inputs).float())
        return cls(torch.cat(parts), tuple(known))

    def whitening(self, noise: float) -> tuple[Tensor, Tensor]:
        """The symmetric matrix after which embeddings have the same power in every direction,
        [width, width], and the power of each embedding after it, [tokens, places].

        `noise` is what every direction has besides, over the mean of all.
        """
        if noise not in self.whitened:
            flat = self.embedded[:: max(1, len(self.embedded) // CHUNK)].flatten(0, 1).double()
            values, vectors = torch.linalg.eigh(flat.mT @ flat / len(flat))
            scale = (values.clamp_min(0) + noise * values.mean()).rsqrt()
            matrix = ((vectors * scale) @ vectors.mT).float()
            chunks = self.embedded.split(CHUNK)
            power = [(chunk @ matrix).square().sum(-1) for chunk in chunks]
            self.whitened[noise] = matrix, torch.cat(power)
        return self.whitened[noise]


def tokens_nearest(rows: Sequence[Tensor], vocabulary: Vocabulary) -> list[list[int]]:
    """The tokens whose embeddings are nearest to the rows of `rows`, [tokens, width] each.

    For features that left before the first block, and for the output of an `Inverter` on later
    ones.
    """
    found: list[list[int]] = [[] for _ in rows]
    for place in range(max(map(len, rows))):
        candidates = vocabulary.embedded[:, place]
        power = candidates.square().sum(1)[:, None]
        there = [i for i, row in enumerate(rows) if len(row) > place]
        wanted = torch.stack([rows[i][place] for i in there])
        for i, token in zip(there, (power - 2 * candidates @ wanted.mT).argmin(0), strict=True):
            found[i].append(int(token))
    return found


@dataclass(frozen=True)
class Inverter:
    """A linear map from features back to embeddings, learnt from public rows."""

    weights: Tensor  # [width + 1, width]

    @classmethod
    def learnt(cls, features: Sequence[Tensor], embedded: Sequence[Tensor]) -> "Inverter":
        x = _with_ones(torch.cat(list(features))).double()
        y = torch.cat(list(embedded)).double()
        gram = x.mT @ x
        small = 1e-6 * gram.diagonal().mean()  # where there are fewer tokens than numbers
        eye = torch.eye(len(gram), dtype=gram.dtype)
        return cls(torch.linalg.solve(gram + small * eye, x.mT @ y).float())

    def __call__(self, features: Tensor) -> Tensor:
        return _with_ones(features) @ self.weights


def tokens_in_span(gradient: Tensor, vocabulary: Vocabulary, *, signs: bool) -> Tensor:
    """How much of each token's embedding lies in the row span of a gradient, [tokens], at most 1.

    DAGER (Petrov et al. 2024, arXiv:2405.15586): the gradient of a layer's weight is a sum of outer
    products with its inputs, so inputs lie in its row span where they are fewer than the span's
    room. The largest of all places counts. Directions are weighed by how common they are among
    embeddings, which does not move what lies in the span, and orders what lies there in part.
    Where inputs are more than that, the directions with the most power stand for the span.
    """
    width = gradient.shape[1]
    noise = SIGN_NOISE if signs else 1e-4
    values, vectors = torch.linalg.eigh(gradient.double().mT @ gradient.double())
    rank = int((values > _rounding(gradient, signs)).sum())
    matrix, power = vocabulary.whitening(noise)
    # of many signs a third of the width did best; of what spans nearly all, its strongest half
    most = width // 3 if signs else rank if rank < NEARLY * width else width // 2
    if rank <= most:
        basis, _ = torch.linalg.qr(matrix.double() @ vectors[:, width - rank :])
    else:
        rank, whole = most, gradient.double() @ matrix.double()
        basis = torch.linalg.eigh(whole.mT @ whole).eigenvectors[:, width - most :]
    outside = rank > width // 2  # the smaller part is computed
    if outside:
        basis = torch.linalg.qr(basis, mode="complete")[0][:, rank:]
    reading = (matrix.double() @ basis).float()
    read = [(chunk @ reading).square().sum(-1) for chunk in vocabulary.embedded.split(CHUNK)]
    share = torch.cat(read) / power
    return _without_known((1 - share if outside else share).amax(1), vocabulary.known)


def tokens_by_power(gradient: Tensor, vocabulary: Vocabulary, public: Examples) -> Tensor:
    """The power of a gradient along each token's embedding, the largest of all places, [tokens],
    raised for tokens that are common in public rows: for who knows of noise on what came.

    Of a span under noise every direction holds some; those that inputs have hold more. Both parts
    count in deviations over all tokens, that of how common they are half.
    """
    matrix, power = vocabulary.whitening(SIGN_NOISE)
    if len(gradient) > gradient.shape[1]:  # a square one has the same power in every direction
        gradient = torch.linalg.qr(gradient.double(), mode="r")[1]
    reading = (matrix.double() @ (gradient.double() @ matrix.double()).mT).float()
    read = [(chunk @ reading).square().sum(-1) for chunk in vocabulary.embedded.split(CHUNK)]
    found = (torch.cat(read) / power).amax(1)
    count = np.bincount(public.ids, minlength=len(found))
    common = torch.log(torch.from_numpy(count).float() + 0.3)
    parts = [(part - part.mean()) / part.std() for part in (found, common)]
    return _without_known(parts[0] + 0.5 * parts[1], vocabulary.known)


@dataclass(frozen=True)
class BagDecoder:
    """Which tokens a text holds, from its features by linear regression on public rows.

    Multi-label inversion of Song and Raghunathan 2020 (arXiv:2004.00053).
    """

    weights: Tensor  # [width + 1, tokens seen]
    seen: Tensor  # int64 [tokens seen], of `tokens` in the vocabulary
    tokens: int
    mean: Tensor
    spread: Tensor
    length: float  # the usual norm of features
    known: tuple[int, ...]

    @classmethod
    def learnt(
        cls, features: Tensor, public: Examples, tokens: int, known: Sequence[int]
    ) -> "BagDecoder":
        """The ridge is the one of `RIDGES` that is best on a tenth of the rows."""
        seen, places = np.unique(public.ids, return_inverse=True)
        held = torch.zeros(len(public), len(seen))
        held[torch.from_numpy(np.repeat(np.arange(len(public)), public.lengths)), places] = 1.0
        mean, spread = features.mean(0), features.std(0) + 1e-6
        x = _with_ones((features - mean) / spread)
        fit = len(public) * 9 // 10
        eye = torch.eye(x.shape[1])
        gram, moment = x[:fit].mT @ x[:fit], x[:fit].mT @ held[:fit]
        tried = [torch.linalg.solve(gram + ridge * eye, moment) for ridge in RIDGES]
        errors = [(x[fit:] @ w - held[fit:]).square().sum() for w in tried]
        chosen = tried[int(torch.stack(errors).argmin())]
        length = float(features.norm(dim=1).mean())
        there = torch.from_numpy(seen.astype(np.int64))
        return cls(chosen, there, tokens, mean, spread, length, tuple(known))

    def __call__(self, features: Sequence[Tensor], *, unit: bool) -> Tensor:
        """Scores [tokens], summed over these features; if `unit`, only their directions count."""
        total = torch.zeros(len(self.seen))
        for each in features:
            scaled = each * (self.length / each.norm().clamp_min(1e-30)) if unit else each
            total += (_with_ones(((scaled - self.mean) / self.spread)[None]) @ self.weights)[0]
        scores = torch.full((self.tokens,), -torch.inf)
        scores[self.seen] = total
        return _without_known(scores, self.known)


def best(scores: Tensor, count: int) -> set[int]:
    """The tokens with the highest scores."""
    return set(scores.topk(count).indices.tolist())


def _rounding(gradient: Tensor, signs: bool) -> float:
    """The square of the largest singular value that rounding to fp16 gives a matrix of this power.

    Rounding errors are uniform, so of a twelfth of the step's power; a random matrix of deviation s
    has no singular value much above s (sqrt(rows) + sqrt(columns)).
    """
    rows, columns = gradient.shape
    power = float(gradient.double().square().mean()) * FP16_STEP**2 / 12
    return 1e-10 if signs else 4 * power * (np.sqrt(rows) + np.sqrt(columns)) ** 2


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _without_known(scores: Tensor, known: Sequence[int]) -> Tensor:
    scores[list(known)] = -torch.inf
    return scores


# --- membership ---


def members_by_loss(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much the loss of each candidate fell (Yeom et al. 2018, arXiv:1709.01604)."""
    return before - after


def members_by_lira(fallen: np.ndarray, shadows: np.ndarray) -> np.ndarray:
    """The same in deviations from answers about other rows, [candidates].

    Those are the `shadows`, [answers, candidates].

    The offline form of LiRA (Carlini et al. 2022, arXiv:2112.03570), one normal distribution for
    each candidate.
    """
    return (fallen - shadows.mean(0)) / (shadows.std(0) + 1e-9)


def members_by_gradient(update: Tensor, own: Tensor) -> float:
    """The cosine of what came back and what one candidate alone would have sent."""
    return float(torch.nn.functional.cosine_similarity(update, own, dim=0))


def members_by_features(seen: Sequence[Tensor], own: Tensor) -> float:
    """How near a candidate's features are to the nearest of those that came, as a negative."""
    same = [row for row in seen if row.shape == own.shape]
    return max((-float((row - own).norm()) for row in same), default=-1e9)


# --- measures ---


def auc(scores: np.ndarray, member: np.ndarray) -> float:
    """The chance that a member scores above another row; ties count half."""
    inside, outside = scores[member][:, None], scores[~member][None]
    return float((inside > outside).mean() + 0.5 * (inside == outside).mean())


def interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean by the bootstrap over answers."""
    found = np.asarray(values)
    rng = np.random.default_rng(seed)
    means = found[rng.integers(len(found), size=(draws, len(found)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
