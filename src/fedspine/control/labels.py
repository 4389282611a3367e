"""The label distribution of a batch merged from many devices, and its distance from the fleet's.

MergeSFL (Liao et al. 2024, arXiv:2311.13348), Eq. 11 and 12, as reconstructed.
"""

import numpy as np
from jaxtyping import Float, Int


def distribution(labels: Int[np.ndarray, " rows"], classes: int) -> Float[np.ndarray, " classes"]:
    """The share of each class in a device's labels (V_i); raises ValueError for no rows or a label
    beyond `classes`.

    >>> distribution(np.array([0, 2, 2, 2]), 3).tolist()
    [0.25, 0.0, 0.75]
    """
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels from 0 to {classes - 1} were expected, at least one")
    return np.bincount(labels, minlength=classes) / len(labels)


def reference(labels: Float[np.ndarray, "workers classes"]) -> Float[np.ndarray, " classes"]:
    """The target distribution (Phi_0): the plain mean over all eligible workers."""
    return labels.mean(axis=0)


def merged(
    batches: Float[np.ndarray, "*plans workers"] | Int[np.ndarray, "*plans workers"],
    labels: Float[np.ndarray, "workers classes"],
) -> Float[np.ndarray, "*plans classes"]:
    """The expected label distribution of merged batches (Phi), for one plan or many; a worker left
    out has 0 rows.

    >>> merged(np.array([30, 10]), np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [0.75, 0.25]
    """
    return batches @ labels / batches.sum(axis=-1, keepdims=True)


def class_log_ratios(
    labels: Float[np.ndarray, "workers classes"],
    reference: Float[np.ndarray, " classes"],
    share: float,
) -> Float[np.ndarray, "workers classes"]:
    """`share` times log(V_i / Phi_0): how much more likely each class is at a worker than in the
    fleet, in nats, [workers, classes]; 0 for a worker with the fleet's label distribution, and at
    `share` 1 minus infinity for a class that it lacks.

    With logits adjusted by it, as in logit adjustment (Menon et al. 2021, arXiv:2007.07314) and
    FedLC (Zhang et al. 2022, arXiv:2209.00189), a model gains nothing from knowing which worker a
    row comes from.

    >>> labels = np.array([[1.0, 0.0], [0.5, 0.5]])
    >>> class_log_ratios(labels, np.array([0.5, 0.5]), 0.5).round(3).tolist()
    [[0.405, -0.693], [0.0, 0.0]]
    """
    ratio = np.divide(labels, reference, out=np.ones_like(labels), where=reference > 0)
    return np.log(1 - share + share * ratio)


def divergence(
    merged: Float[np.ndarray, "*plans classes"], reference: Float[np.ndarray, " classes"]
) -> Float[np.ndarray, "*plans"]:
    """KL(merged || reference) in nats, at least 0; a class that `merged` lacks adds nothing.

    Infinite if `merged` has a class that `reference` lacks, which is impossible if both come from
    the same workers.

    >>> round(float(divergence(np.array([1.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0]))), 4)  # ln 2
    0.6931
    """
    held, aim = np.broadcast_arrays(merged, reference)
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of 0 is replaced
        terms = np.where(held > 0, held * np.log(held / aim), 0.0)
    return np.maximum(terms.sum(axis=-1), 0.0)  # rounding may leave equals a hair below
