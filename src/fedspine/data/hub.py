"""Data sets of the Hugging Face Hub, through the optional package `datasets` (`pip install
'fedspine[hub]'`).
"""

from typing import Any

from fedspine.core.errors import BadInput, listed, reason_of
from fedspine.data import arrow
from fedspine.data.files import split_of
from fedspine.data.parts import FilePart, Pick, Read


def source(name: str) -> dict[str, Read]:
    """A reader for each split of the data set `name`: "train", and "test" or "validation" where
    they exist.

    `name` is a Hub id, with a configuration after a colon where the data set has several
    (`nyu-mll/glue:sst2`), or a local folder that `datasets` can load. Raises BadInput without the
    package, without the data set, or without a training split.
    """
    try:
        import datasets
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise BadInput(
            f"reading {name!r} from the Hugging Face Hub needs the package datasets: pip install "
            "'fedspine[hub]'"
        ) from error
    logging.set_verbosity_error()  # no line for each retry
    identifier, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(identifier, configuration or None)
    except Exception as error:  # whatever the loader's network, file and builder libraries raise
        raise BadInput(
            f"the Hugging Face Hub does not provide {name!r}: {reason_of(error)}; "
            "check the name and the network, and name a configuration after a colon, as in "
            "'nyu-mll/glue:sst2'"
        ) from error
    splits = {
        split_of(split): part
        for split, part in loaded.items()
        if split == "train" or split in _TESTS
    }
    if "train" not in splits:
        raise BadInput(
            f"expected a split 'train' in {name!r} of the Hugging Face Hub, found "
            f"{listed(loaded)}; name another data set or configuration"
        )
    return {split: _reader(part) for split, part in splits.items() if split is not None}


_TESTS = ("test", "validation", "dev")


def _reader(split: Any) -> Read:
    def read(pick: Pick) -> FilePart:
        names = {
            column: {"names": getattr(feature, "names", None)}
            for column, feature in split.features.items()
        }
        return arrow.part(split.with_format("arrow")[:], pick, features=names)

    return read
