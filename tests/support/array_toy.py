"""A toy task on arrays that a small net can learn, in the shapes of sensor, sound
and picture data.
"""

import numpy as np

from fedspine.core.task import Task
from fedspine.nets.load import load

CLASSES = ("slow", "middle", "fast")


def waves(rows, seed, *, channels=2, samples=16):
    """Noisy waves of one of three frequencies, float32 [rows, channels, samples], and its number,
    int64 [rows].
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(CLASSES)
    times = np.arange(samples) / samples
    angle = 2 * np.pi * ((labels + 1)[:, None, None] * times + rng.random((rows, channels, 1)))
    return (np.sin(angle) + 0.3 * rng.standard_normal((rows, channels, samples))).astype(
        np.float32
    ), labels


def bars(rows, seed, *, side=8, channels=1):
    """Pictures uint8 [rows, side, side] (with channels: one more dimension at the end) with a
    bright bar in one third.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(CLASSES)
    pictures = rng.integers(0, 60, (rows, side, side, channels))
    for picture, label in zip(pictures, labels, strict=True):
        picture[label * side // 3 : label * side // 3 + 2] += 150
    return pictures.astype(np.uint8).squeeze(3) if channels == 1 else pictures.astype(
        np.uint8
    ), labels


def array_task(net="cnn-h", *, make=waves, rounds=5, train=240, test=90):
    """The task of classifying three kinds of arrays."""
    base, rows, others = load(net, make(train, 0), make(test, 1), len(CLASSES))
    return Task(
        kind="array",
        base=base,
        train=rows,
        test=others,
        label_names=CLASSES,
        max_tokens=1,
        rounds=rounds,
        turns=0.0,
    )
