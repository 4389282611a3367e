"""Reference scores for a run: the commonest class, a classical model on the pooled rows, the
untuned base.

A data set on which one cannot be computed has no such line. The only file that knows scikit-learn.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedspine.core.strict import parsed
from fedspine.data.dataset import Rows
from fedspine.storage.store import write_atomically

REFERENCES = "references.json"  # in a run's folder, so that a resume does not compute them again
MOST_ROWS = 40_000  # training rows that are fitted; of more, so many drawn at random
MOST_WORDS = 30_000  # of the vocabulary
MOST_CHARACTERS = 4_000  # of a text
MOST_ARRAYS = 10_000  # training rows of arrays that are fitted
MOST_VALUES = 600  # of a row of arrays, after neighbours were averaged
ITERATIONS = 200
_SAMPLE_SEED = 20260103


def commonest_share(labels: np.ndarray | None) -> float | None:
    """The share of the commonest class among these labels, None where there are none.

    >>> commonest_share(np.array([0, 1, 1, 2]))
    0.5
    """
    if labels is None or not len(labels):
        return None
    return float(np.bincount(labels).max() / len(labels))


def kept(folder: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The stored references of the run in `folder`; else those of `compute`, then stored."""
    path = folder / REFERENCES
    try:
        return dict(parsed(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        found = compute()
        write_atomically(path, json.dumps(found, indent=1).encode())
        return found


def classical(train: Any, test: Any, scored: np.ndarray) -> float | None:
    """Accuracy of logistic regression, fitted on all training rows together, on the `scored` test
    rows.

    Of texts it reads TF-IDF of words, of pairs those of both texts with their product and absolute
    difference, of arrays standardised values after neighbours were averaged. `train` and `test` are
    `Rows` or anything with `x` [rows, ...] and `labels`. None where it cannot be computed: no
    labels, one class, or no words; ImportError without scikit-learn.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if train.labels is None or len(np.unique(train.labels)) < 2 or not len(scored):
        return None
    texts = isinstance(train, Rows)
    chosen = _drawn(len(train.labels), MOST_ROWS if texts else MOST_ARRAYS)
    if len(np.unique(train.labels[chosen])) < 2:
        return None
    features = _of_texts if texts else _of_arrays
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a reference may stop early
            rows, others = features(train, chosen, test, scored)
            model = LogisticRegression(C=10.0 if texts else 0.01, max_iter=ITERATIONS)
            model.fit(rows, train.labels[chosen])
            return float((model.predict(others) == test.labels[scored]).mean())
    except ValueError:  # no words are left in the texts
        return None


def _drawn(rows: int, most: int) -> np.ndarray:
    return np.sort(np.random.default_rng(_SAMPLE_SEED).permutation(rows)[:most])


def _of_texts(train: Rows, chosen: np.ndarray, test: Rows, scored: np.ndarray) -> tuple[Any, Any]:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    def taken(texts: Any, index: np.ndarray) -> list[str]:
        return [texts[i][:MOST_CHARACTERS] for i in index]

    words = TfidfVectorizer(max_features=MOST_WORDS, sublinear_tf=True, dtype=np.float32)
    firsts = taken(train.texts, chosen)
    if train.pairs is None or test.pairs is None:
        return words.fit_transform(firsts), words.transform(taken(test.texts, scored))
    words.fit(firsts + taken(train.pairs, chosen))
    found = []
    for rows, index in ((train, chosen), (test, scored)):
        one, two = (words.transform(taken(texts, index)) for texts in (rows.texts, rows.pairs))
        found.append(hstack([one, two, one.multiply(two), abs(one - two)]).tocsr())
    return found[0], found[1]


def _of_arrays(train: Any, chosen: np.ndarray, test: Any, scored: np.ndarray) -> tuple[Any, Any]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    rows = scaler.fit_transform(_coarse(train.x[chosen]))
    return rows, scaler.transform(_coarse(test.x[scored]))


def _coarse(x: np.ndarray) -> np.ndarray:
    """Rows as flat float32 [rows, at most MOST_VALUES], neighbours along the longest sides
    averaged.

    >>> _coarse(np.ones((2, 9, 128), np.uint8)).shape
    (2, 576)
    """
    x = x.astype(np.float32)
    while np.prod(x.shape[1:]) > MOST_VALUES:
        side = 1 + int(np.argmax(x.shape[1:]))
        even = x.shape[side] // 2 * 2
        x = np.moveaxis(x, side, -1)[..., :even]
        x = np.moveaxis(x.reshape(*x.shape[:-1], -1, 2).mean(-1), -1, side)
    return x.reshape(len(x), -1)
