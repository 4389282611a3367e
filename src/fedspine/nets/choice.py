"""The default net for rows of a given shape; free of torch."""

from fedspine.core.errors import BadInput

# smallest height and width of an image, in pixels, that three poolings do not reduce to nothing
SMALLEST = 8
# samples in time that leave one after all poolings: CNN-H halves twice, CNN-S takes 80 every 16 and
# quarters four times
LONG_ENOUGH = {"cnn-h": 4, "cnn-s": ((((4 + 2) * 4 + 2) * 4 + 2) * 4 - 1) * 16 + 80}
CHANNELS = (1, 3, 4)  # of an image: grey, colour, colour and transparency
SMALL = 32  # pixels up to which AlexNet's flat layer is cheap; it grows with height times width
OBLONG = 2  # longest over shortest side up to which floats of two dimensions are an image


def net_for(shape: tuple[int, ...], *, bytes: bool) -> str:
    """The cheapest net that reads rows of this shape; `bytes` says whether their values are uint8.

    Rows of one dimension are audio clips or other series. Rows of two are images if their values
    are bytes or their sides are alike, else windows, [channels, time]. Rows of three are images.
    Raises BadInput for rows that no net reads.

    >>> net_for((16000,), bytes=False), net_for((9, 128), bytes=False)
    ('cnn-s', 'cnn-h')
    >>> net_for((28, 28), bytes=True), net_for((3, 96, 96), bytes=True)
    ('alexnet-small', 'vgg-small')
    """
    sides = _sides(shape, bytes)
    if sides is not None and min(sides) >= SMALLEST:
        return "alexnet-small" if max(sides) <= SMALL else "vgg-small"
    if len(shape) == 1 or (len(shape) == 2 and shape[0] <= shape[1]):
        for net in ("cnn-s", "cnn-h"):
            if shape[-1] >= LONG_ENOUGH[net]:
                return net
    raise BadInput(
        f"no net reads rows of shape {list(shape)}: images are [height, width] of at least "
        f"{SMALLEST} pixels, with 1, 3 or 4 channels before or after, and windows [channels, time] "
        f"with at least {LONG_ENOUGH['cnn-h']} times and no more channels than times; reshape them"
    )


def _sides(shape: tuple[int, ...], bytes: bool) -> tuple[int, ...] | None:
    """Height and width, if the rows are images."""
    match len(shape):
        case 2 if (bytes and min(shape) >= SMALLEST) or max(shape) <= OBLONG * min(shape):
            return shape
        case 3 if shape[0] in CHANNELS:
            return shape[1:]
        case 3 if shape[2] in CHANNELS:
            return shape[:2]
    return None
