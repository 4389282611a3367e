"""The provenance of an exported model for its model card: method, data, base and licence."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, try_to_load_from_cache
from yaml import YAMLError

from fedspine.core.errors import BadInput
from fedspine.lm.gguf_files import is_gguf
from fedspine.lm.load import MINILM_HUB
from fedspine.lm.weightless import described

HUB = {"minilm": MINILM_HUB, "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LICENCES = {"smollm2": "apache-2.0"}  # of packages without a model card
TAGS = "[fedspine, federated-learning, structured-pruning]"
CARD = "README.md"


@dataclass(frozen=True)
class Provenance:
    """The run that a model comes from. No field names a path of the machine that exported it."""

    method: str  # with its rounds and devices
    data: str
    base: str  # a Hub id, or the name of a file or folder
    on_hub: bool  # whether `base` is a Hub id
    licence: str | None  # of the base, from its own model card; None if that states none


def provenance_of(method: str, data: str, model: str, place: str) -> Provenance:
    """Of a recipe's method, `task.data` and `task.model`, whose base was loaded from `place`."""
    on_hub = model in HUB or not (is_gguf(place) or Path(place).expanduser().exists())
    return Provenance(
        method=method,
        data=_named(data),
        base=HUB.get(model, model) if on_hub else Path(model).name,
        on_hub=on_hub,
        licence=licence_of(place),
    )


def licence_of(model: str) -> str | None:
    """The licence in the model card next to a base; None if there is none."""
    if model in LICENCES:
        return LICENCES[model]
    if is_gguf(model):
        return None
    try:
        place = Path(described(model)[0])  # without the digest of its weights
    except BadInput:  # the base has moved
        return None
    cached = None if place.is_dir() else try_to_load_from_cache(str(place), CARD)
    card = Path(cached) if isinstance(cached, str) else place / CARD
    if not card.is_file():
        return None
    try:
        licence = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError):
        return None
    return str(licence.license) if licence.license else None


def rows_of(provenance: Provenance | None) -> str:
    """The rows of a model card's table; none without a provenance."""
    if provenance is None:
        return ""
    licence = provenance.licence or f"not stated where {provenance.base} was loaded from"
    return (
        f"| method | {provenance.method} |\n| data | {provenance.data} |\n"
        f"| base | {provenance.base} |\n| licence of the base | {licence} |\n"
    )


def front_matter(library: str, provenance: Provenance | None) -> str:
    """The metadata of a model card, which the Hub reads."""
    lines = ["---", f"library_name: {library}", f"tags: {TAGS}"]
    if provenance is not None and provenance.on_hub:
        lines.append(f"base_model: {json.dumps(provenance.base)}")
    if provenance is not None and provenance.licence is not None:
        lines.append(f"license: {json.dumps(provenance.licence)}")
    return "\n".join([*lines, "---"])


def _named(data: str) -> str:
    """The last part of a path, which is enough and reveals nothing about the machine."""
    path = Path(data).expanduser()
    return path.name if path.is_absolute() or path.exists() or data.startswith(".") else data
