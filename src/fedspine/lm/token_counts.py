"""How often tokens occur in texts: counted openly, or by devices as a private histogram.

A device adds noise to its own counts before they leave (local differential privacy of each text:
neighbours differ in that one text is there or not). A text counts for at most `clip` of its tokens,
drawn at random, so the counts of two neighbours differ by at most `clip` in sum, and noise of the
discrete Laplace distribution of that scale over epsilon gives epsilon (the geometric mechanism of
Ghosh, Roughgarden and Sundararajan 2009, arXiv:0811.2841). The server adds the counts and takes as
zero what noise alone may have made.
"""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from fedspine.core.draws import Draws
from fedspine.core.message import message
from fedspine.core.task import Examples

_STEPS = 400  # of the search for the best bound; a finer one lowers it by less than one count
_MOST = np.iinfo(np.int32).max


@message
class CountTokens:
    """Ask a device for a histogram of its tokens."""

    tokens: int  # rows of the embedding
    clip: int  # tokens of one text that count
    epsilon: float | None  # of each text; None: all tokens count, and nothing is promised

    @property
    def ratio(self) -> float:
        """The noise k has a probability proportional to this to the power of |k|."""
        return 0.0 if self.epsilon is None else float(np.exp(-self.epsilon / self.clip))


@message
class TokenCounts:
    """What leaves the device."""

    counts: np.ndarray  # int32 [tokens], below zero where the noise was


def open_counts(ids: Sequence[Sequence[int]], tokens: int) -> Int[np.ndarray, " tokens"]:
    """How often each token occurs in texts that anyone may know."""
    flat = np.fromiter((id for text in ids for id in text), np.int64)
    return np.bincount(flat, minlength=tokens)


def private_counts(
    data: Examples, special: Collection[int], order: CountTokens, draws: Draws
) -> TokenCounts:
    """A device's noisy histogram of its texts; `special` tokens, which every text has, are left
    out.
    """
    texts = np.repeat(data.texts_of(np.arange(len(data))), data.lengths)
    usual = ~np.isin(data.ids, sorted(special))
    ids, texts = data.ids[usual], texts[usual]
    shuffled = np.lexsort((draws.uniform(len(ids)), texts))
    ids, texts = ids[shuffled], texts[shuffled]
    place_in_text = np.arange(len(texts)) - np.searchsorted(texts, texts)
    if order.epsilon is not None:
        ids = ids[place_in_text < order.clip]
    exact = np.bincount(ids, minlength=order.tokens)
    noisy = exact + discrete_laplace(order.tokens, order.ratio, draws)
    return TokenCounts(counts=np.clip(noisy, -_MOST, _MOST).astype(np.int32))


def discrete_laplace(count: int, ratio: float, draws: Draws) -> Int[np.ndarray, " count"]:
    """Draws k with a probability proportional to ratio^|k|: differences of two geometric ones."""
    if not ratio:
        return np.zeros(count, np.int64)
    one, other = (np.floor(np.log1p(-draws.uniform(count)) / np.log(ratio)) for _ in range(2))
    return (one - other).astype(np.int64)


def summed(replies: Sequence[TokenCounts], order: CountTokens) -> Int[np.ndarray, " tokens"]:
    """The counts of all devices together, 0 below what noise alone may have made."""
    total = np.sum([reply.counts for reply in replies], axis=0, dtype=np.int64)
    return np.where(total >= floor_of(len(replies), order), total, 0)


def floor_of(devices: int, order: CountTokens) -> int:
    """The least sum that counts: of tokens that no text has, one at most is expected to reach it.

    Chernoff's bound: n noises are together t or more with a probability of at most
    M(s)^n exp(-s t) for any s, with M(s) = (1 - a)^2 / ((1 - a e^s)(1 - a e^-s)) the discrete
    Laplace distribution's moments and a its ratio.
    """
    ratio = order.ratio
    if not ratio:
        return 1
    s = np.linspace(0, -np.log(ratio), _STEPS + 2)[1:-1]
    moments = 2 * np.log1p(-ratio) - np.log1p(-ratio * np.exp(s)) - np.log1p(-ratio * np.exp(-s))
    return max(1, int(np.ceil(((devices * moments + np.log(order.tokens)) / s).min())))
