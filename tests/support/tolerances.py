"""What tests allow a number to be off by, from the cause of its error.

A sum of n products is rounded n times, each time by at most a unit roundoff of the sum so far. The
roundings are of both signs, so all of them come to sqrt(n) unit roundoffs times a factor, which is
more than CERTAIN with a probability of 2 exp(-CERTAIN^2 / 2), one in 100,000 (Higham and Mary 2019,
A New Approach to Probabilistic Rounding Error Analysis, theorem 2.4).
"""

import math

import numpy as np

from fedspine.control.latency_model import LIKE_THE_FLEET, UNDECIDED
from fedspine.lm.tiny import CHANNELS, WIDTH

FP32, FP16, BF16 = 2.0**-24, 2.0**-11, 2.0**-8  # unit roundoffs: half a unit in the last place
CERTAIN = 5.0

# of a logit of the models of `fedspine.lm.tiny`: two blocks of five products of their width (query,
# attention, output, up and its gate) and one of their channels, then the pooler and the head
TINY_SUMS = 2 * (5 * WIDTH + CHANNELS) + 2 * WIDTH


def rounding(sums, size=1.0):
    """How far two computations in fp32 are apart that add up `sums` products, one after another or
    in layers, to numbers of at most `size`. Both round, hence the root of 2.
    """
    return CERTAIN * math.sqrt(2 * sums) * FP32 * size


# Of a tiny model's logits of size 1, and relative to their size; of a loss as well, which is a mean
# of differences of logits. About 1e-5.
TINY = rounding(TINY_SUMS)
# What an export in fp32 may be off by in a logit, as docs/runs.md promises. The largest logits of
# tests, 19 of stories260k, have some 2600 sums: sqrt(2600) roundings of them are 6e-5.
LOGITS = 1e-4


def undecided(gram, exact):
    """How far the common coefficients of a device alone may be from its `exact` ones.

    With G = `gram`, the features' sums of squares, g its least eigenvalue and u = UNDECIDED of its
    trace, they are off by u (G + u)^-1 times the exact ones.
    """
    weight = UNDECIDED * max(np.trace(gram), 1.0)
    return weight / np.linalg.eigvalsh(gram)[0] * float(np.linalg.norm(exact))


def ridge(gram, exact):
    """How far the coefficients of a device alone may be from its `exact` ones.

    They are drawn to the best multiple of the common ones, which is not further off than those, by
    p / (p + g) of the way, with p = LIKE_THE_FLEET and g as above.
    """
    least = np.linalg.eigvalsh(gram)[0]
    return LIKE_THE_FLEET / (LIKE_THE_FLEET + least) * undecided(gram, exact)
