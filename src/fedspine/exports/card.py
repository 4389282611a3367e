"""The model card of an exported folder: the `fedspine` entry of its `config.json`."""

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import pydantic

from fedspine.core.errors import BadInput, listed
from fedspine.core.task import Pooling, TaskKind
from fedspine.exports.provenance import Provenance
from fedspine.lm.structure import StructureKind
from fedspine.lm.vocabulary import VocabularyCut

FORMAT = 2
CONFIG, WEIGHTS = "config.json", "model.safetensors"
ONNX = "model.onnx"  # instead of WEIGHTS in a folder for ONNX Runtime
EXECUTORCH = "model.pte"  # in a folder for ExecuTorch
GGUF = "model.gguf"  # in a folder for llama.cpp
TOKENIZER = "tokenizer"  # in a folder for llama.cpp: configuration, card and tokenizer of the model
ADAPTER = "adapter_config.json"  # in a folder for PEFT
BASE = "base"  # in a folder for PEFT, the model that the adapter fits
PARITY = "parity.json"  # how much a folder for another runtime differs from the PyTorch model


@dataclass(frozen=True)
class Card:
    """The facts about a model that are in neither its weights nor a stock configuration."""

    format: int
    name: str
    kind: TaskKind
    labels: tuple[str, ...]  # empty for language modelling
    pooling: Pooling | None  # the readout; None for language modelling
    max_tokens: int
    heads: tuple[int, ...]  # kept in each layer; with grouped queries, key/value heads
    channels: tuple[int, ...]  # kept in each layer
    sparsity: float  # share of the blocks' linear weights that is pruned
    merged: bool  # whether the adapter is inside the weights
    stock: bool  # whether stock transformers loads the folder
    # absent in cards of older versions
    chat: bool = False  # whether it was tuned on dialogues
    structure: StructureKind = "free"  # whether all layers were to keep as many units
    provenance: Provenance | None = None  # the run, the data and the base
    vocabulary: VocabularyCut | None = None  # what is left of the model's; None: all

    @property
    def structure_line(self) -> str:
        """The kind of structure, and the units per layer if it is uniform."""
        match self.structure:
            case "free":
                return "free: layers may keep different numbers of heads and channels"
            case "few_heads":
                return "few_heads: the share of kept heads is the square of that of kept weights"
        units = f"{self.heads[0]} heads and {self.channels[0]} channels"
        return f"uniform: {units} in every layer, which a stock configuration can describe"

    @property
    def vocabulary_line(self) -> str:
        """How many tokens the model has of those it began with."""
        return "all tokens" if self.vocabulary is None else self.vocabulary.line

    @property
    def rows(self) -> str:
        """The lines of a README's table that say what is kept, and how long inputs may be."""
        language = self.kind == "causal-lm"
        heads = "key/value heads" if language else "heads"
        longest = "longest input in training" if language else "longest input"
        return f"""\
| share of the blocks' weights pruned | {self.sparsity:.1%} |
| {heads} kept, by layer | {", ".join(map(str, self.heads))} |
| channels kept, by layer | {", ".join(map(str, self.channels))} |
| structure | {self.structure_line} |
| vocabulary | {self.vocabulary_line} |
| {longest}, in tokens | {self.max_tokens} |
"""


OPTIONAL = ("chat", "structure", "provenance", "vocabulary")


def format_of(place: Path) -> Literal["hf", "onnx", "executorch", "gguf", "peft"]:
    """The format of an exported folder, or of a `.gguf` file."""
    if gguf_in(place) is not None:
        return "gguf"
    if (place / ADAPTER).is_file():
        return "peft"
    if (place / EXECUTORCH).is_file():
        return "executorch"
    return "onnx" if (place / ONNX).is_file() else "hf"


def quantize_of(place: Path) -> str | None:
    """How the numbers of an exported folder are stored, as its parity report says; None without."""
    try:
        report = json.loads((place / PARITY).read_text(encoding="utf-8"))
        return str(report["quantize"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_net(place: Path) -> bool:
    """Whether an exported folder is a net on arrays, which has neither card nor tokenizer."""
    return (place / ONNX).is_file() and not (place / CONFIG).is_file()


def gguf_in(place: Path) -> Path | None:
    """The GGUF file at or in `place`, None for another format."""
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        return place
    return place / GGUF if (place / GGUF).is_file() else None


def weights_of(place: Path) -> Path:
    """The file that holds the weights of an exported folder."""
    match format_of(place):
        case "gguf":
            return gguf_in(place) or place
        case "peft":
            return place / BASE / WEIGHTS
        case "onnx":
            return place / ONNX
        case "executorch":
            return place / EXECUTORCH
    return place / WEIGHTS


def weight_bytes(place: Path) -> int:
    """Bytes of all weight files; for an adapter, those of its base included."""
    beside = place / "adapter_model.safetensors" if format_of(place) == "peft" else None
    return weights_of(place).stat().st_size + (beside.stat().st_size if beside else 0)


def copy_beside(source: Path, target: Path) -> None:
    """Copy what lies beside the weights of a merged folder: configuration, card and tokenizer."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name not in (WEIGHTS, "README.md"):
            shutil.copyfile(file, target / file.name)


def read_card(folder: Path) -> Card:
    """The card of an exported folder; raises BadInput for any other folder."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give one that `fedspine export` wrote")
    if not (folder / CONFIG).is_file():
        if files := sorted(file.name for file in folder.iterdir() if file.suffix == ".gguf"):
            raise BadInput(
                f"{folder} is not an exported model, but holds .gguf files; name one of them: "
                f"{listed(files)}"
            )
        raise BadInput(
            f"{folder} has no {CONFIG}, so it is not an exported model; write one with `fedspine "
            "export`"
        )
    try:
        entry = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("fedspine")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{folder / CONFIG} cannot be read ({error}); export the model again"
        ) from None
    if not isinstance(entry, dict):
        raise BadInput(
            f"{folder} is a model but not an export of fedspine ({CONFIG} has no `fedspine` "
            "entry); fine-tune it in a run and `fedspine export` that"
        )
    if entry.get("format") != FORMAT:
        found = entry.get("format")
        raise BadInput(
            f"{folder} has export format {found!r}, but this version reads {FORMAT}; export the "
            "model again"
        )
    return _checked(folder, entry)


def _checked(folder: Path, entry: dict[str, object]) -> Card:
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
    }
    types = {"heads": int, "channels": int, "labels": str}
    lists = all(
        isinstance(i, kind)
        for key, kind in types.items()
        for i in values.get(key, ())  # type: ignore[attr-defined]
    )
    if (
        {field.name for field in fields(Card)} != {*values, *OPTIONAL}
        or values["kind"] not in get_args(TaskKind)
        or values.get("structure", "free") not in get_args(StructureKind)
        or not lists
        or not _is_provenance(values.get("provenance"))
    ):
        raise BadInput(
            f"the `fedspine` entry of {folder / CONFIG} is damaged; export the model again"
        )
    if (words := values.pop("vocabulary", None)) is not None:
        words = _vocabulary(folder, words)
    entry = values.pop("provenance", None)
    known = None if entry is None else Provenance(**entry)  # type: ignore[arg-type]
    return Card(**values, provenance=known, vocabulary=words)  # type: ignore[arg-type]


def _is_provenance(entry: object) -> bool:
    names = {field.name for field in fields(Provenance)}
    return entry is None or (isinstance(entry, dict) and names == set(entry))


def _vocabulary(folder: Path, words: object) -> VocabularyCut:
    try:
        return pydantic.TypeAdapter(VocabularyCut).validate_python(words)
    except pydantic.ValidationError:
        raise BadInput(
            f"the `fedspine` entry of {folder / CONFIG} is damaged; export the model again"
        ) from None
