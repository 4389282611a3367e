"""What labels a device holds, which the server asks once, to choose devices by them."""

import numpy as np

from fedspine.device import Device, on_device
from fedspine.message import message
from fedspine.planning.labels import distribution

LENGTHS = 10  # buckets of text length, which stand for labels where there are none


@message
class Look:
    """Say what labels you hold."""

    classes: int  # 0: the task has none, so count lengths, up to `longest` tokens
    longest: int


@message
class Looked:
    shares: np.ndarray  # float64 [classes]: V_i


@on_device
def look(device: Device, order: Look) -> Looked:
    if order.classes:
        return Looked(shares=distribution(device.data.labels, order.classes))
    buckets = np.minimum(device.data.lengths * LENGTHS // (order.longest + 1), LENGTHS - 1)
    return Looked(shares=distribution(buckets, LENGTHS))
