"""From a run's folder to a model: rebuild the base in fp32, deploy from the last saved state,
export.

Everything about the model comes from the run, except the base's weights, which must be those that
the run was made with.
"""

import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput, listed, unknown
from fedspine.core.task import TaskKind
from fedspine.exports import hf, hf_int8, llama_cpp
from fedspine.exports.parity import ParityCheck
from fedspine.exports.provenance import provenance_of
from fedspine.exports.run_parity import RunParityCheck
from fedspine.exports.saved_run import (
    check_device,
    check_unedited,
    chosen,
    device_ids_of,
    saved_state,
)
from fedspine.exports.whole_folder import bytes_in
from fedspine.lm.base import Base, Model
from fedspine.lm.structure import sparsity
from fedspine.lm.vocabulary import VocabularyCut, cut_in
from fedspine.runs import task_record
from fedspine.runs.assemble import load_base
from fedspine.runs.config import Recipe
from fedspine.runs.run_dir import recipe_of
from fedspine.runs.task_record import TaskRecord

FORMATS = ("hf", "onnx", "executorch", "gguf", "peft")
QUANTISATIONS = {  # by format, the default first; other formats have none
    "hf": ("none", "int8"),
    "onnx": ("none", "fp16", "int8", "int8-static"),
    "executorch": ("none",),
    "gguf": ("f16", "q8_0", "q4_k_m"),
}
OTHER_RUNTIMES = ("onnx", "executorch", "gguf")  # whose exports are always compared


@dataclass(frozen=True)
class RunModel:
    """A run's recipe, record and last saved state, with its base in fp32."""

    recipe: Recipe
    record: TaskRecord
    base: Base
    place: str  # that the base was loaded from
    tokenizer: Any
    state: Any
    vocabulary: VocabularyCut | None = None  # None: all tokens are kept

    def model(self, device: str) -> Model:
        """A device's deployed model, the global one (`global`) or the unpruned one (`dense`)."""
        return chosen(self.recipe.method, self.state, device)


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked beside its device and format; see `export_model`."""

    with_base: bool = False
    base: str | None = None
    quantize: str | None = None
    rows: str | None = None
    parity: bool = True


def open_run(folder: Path, base: str | None = None) -> RunModel:
    """Load a run from its directory, with its base from the recorded path or from `base`.

    Raises BadInput for a folder that is not a run or has no saved round, and for a base that is
    missing or different.
    """
    recipe = recipe_of(folder)
    if recipe.task.kind == "array":
        raise BadInput(
            f"{folder} trained {recipe.task.model!r}, a net on arrays, and only transformers have "
            "a base; leave this run out"
        )
    saved, record = saved_state(folder), task_record.recorded(folder)
    check_unedited(folder, recipe, saved.state["recipe"])
    place = base or recipe.task.model
    kept = task_record.base_of(folder)
    try:
        placed = replace(recipe, task=recipe.task.model_copy(update={"model": place}))
        loaded, tokenizer = load_base(placed, len(record.classes), precision="fp32", kept=kept)
    except BadInput as error:
        raise BadInput(
            f"the base of {folder} cannot be loaded: {error}; if it has moved, give its path with "
            "--base"
        ) from None
    task_record.check_base(record, loaded.weights_sha256, place, folder)
    state = saved.state["method"]
    return RunModel(recipe, record, loaded, place, tokenizer, state, cut_in(kept))


def export_model(
    folder: Path,
    *,
    device: str,
    format: str,
    to: Path,
    with_base: bool = False,
    base: str | None = None,
    quantize: str | None = None,
    rows: str | None = None,
    parity: bool = True,
) -> dict[str, Any]:
    """Write one model of the run in `folder` to the new folder `to`; returns a description of it.

    `with_base` writes the model that a PEFT adapter fits beside it; `base` is where the run's base
    is now. `quantize` is one of the format's `QUANTISATIONS` (None: the first). What was written
    is compared with the run's model on `rows`, data with the run's columns (None: its test rows),
    which `parity=False` leaves out for hf and peft. Nets on arrays have the format onnx alone, and
    language models not executorch.
    Raises BadInput for an unknown format, device or quantisation, a folder that is no run, one that
    exists where `to` should be, an adapter that fits no model that stock tools could load, a model
    that has no such format, and an export outside its tolerance.
    """
    options = ExportOptions(with_base, base, quantize, rows, parity)
    check_options(format, options)
    if os.path.lexists(to):  # a link to nothing, too
        raise BadInput(f"{to} exists already; name a new folder with --to")
    check_device(device, device_ids_of(folder))
    recipe = recipe_of(folder)
    if recipe.task.kind == "array":
        _check_net(recipe, format, base)
        from fedspine.exports import net_of_run  # needs fedspine[onnx]

        net = net_of_run.open_net_run(folder, rows)
        return net_of_run.export_net(net, device, to, quantize=quantize or "none")
    _other_runtime(format, recipe.task.kind)  # before the base is read
    return export_opened(open_run(folder, base), options, device=device, format=format, to=to)


def export_opened(
    run: RunModel, options: ExportOptions, *, device: str, format: str, to: Path
) -> dict[str, Any]:
    """`export_model` of a run that is open already, with options that were checked."""
    other = _other_runtime(format, run.record.kind)
    model, rows = run.model(device), options.rows
    quantize = options.quantize or QUANTISATIONS.get(format, ("none",))[0]
    check = None
    if options.parity and other is None:
        check = RunParityCheck(
            run.recipe, run.record, run.base, run.tokenizer, model, rows, quantize
        )
    more: dict[str, Any] = {}
    if format == "peft":
        from fedspine.exports.adapter import Origin, export_adapter

        of_fewer = run.record.layers is not None, run.vocabulary is not None
        bits = run.recipe.run.frozen_bits
        origin = Origin(options.base or run.record.model, *of_fewer, bits)
        described = {"origin": origin, "with_base": options.with_base, **_card_of(run, device)}
        export_adapter(run.base, model, run.tokenizer, to, **described, parity_check=check)
    elif other is not None:
        check_kind(format, run)
        found = _exported_elsewhere(other, run, model, device, to, quantize=quantize, rows=rows)
        more = {"quantize": quantize, "parity": asdict(found) | {"line": found.line}}
    else:
        _merged(run, model, device, to, parity_check=check, quantize=quantize)
    if check is not None:
        more = {"parity": asdict(check.found) | {"line": check.found.line}}
    return {
        "device": device,
        "format": format,
        "folder": str(to),
        "sparsity": sparsity(run.base.layout, model.structure),
        "bytes": bytes_in(to),
    } | more


def _card_of(run: RunModel, device: str) -> dict[str, Any]:
    """The facts on this model that every export records."""
    recipe = run.recipe
    method = f"{recipe.method.name}, {recipe.run.rounds} rounds over {recipe.fleet.devices} devices"
    if (bits := recipe.run.frozen_bits) is not None:
        method += f"; the blocks' frozen weights had {bits} bits and are expanded here"
    return {
        "labels": run.record.classes,
        "kind": run.record.kind,
        "max_tokens": run.record.max_tokens,
        "name": f"{recipe.method.name} {device}",
        "provenance": provenance_of(method, recipe.task.data, recipe.task.model, run.place),
        "vocabulary": run.vocabulary,
    }


def _merged(
    run: RunModel,
    model: Model,
    device: str,
    to: Path,
    parity_check: ParityCheck | None = None,
    quantize: str = "none",
) -> Path:
    """The model as a Hugging Face folder."""
    return hf.export(
        run.base,
        model,
        run.tokenizer,
        to,
        chat=run.record.of_dialogues,
        structure=getattr(run.recipe.method, "structure", "free"),
        parity_check=parity_check,
        quantize=quantize,
        **_card_of(run, device),
    )


def _exported_elsewhere(
    other: Any,
    run: RunModel,
    model: Model,
    device: str,
    to: Path,
    *,
    quantize: str,
    rows: str | None,
) -> Any:
    """Export the model with the module `other`, for another runtime; returns its parity."""
    from fedspine.exports.parity_rows import calibration_rows, parity_rows

    recipe, record, tokenizer = run.recipe, run.record, run.tokenizer
    examples, rows_from = parity_rows(recipe, record, tokenizer, rows, other.ROWS)
    calibrated = {}
    if quantize == "int8-static":
        from fedspine.exports.onnx_numbers import CALIBRATION_ROWS as most

        calibrated["calibration"] = calibration_rows(recipe, record, tokenizer, most)
    with tempfile.TemporaryDirectory() as scratch:
        return other.export(
            _merged(run, model, device, Path(scratch) / "model"),
            to,
            examples=examples,
            rows_from=rows_from,
            quantize=quantize,
            **calibrated,
        )


def _check_net(recipe: Recipe, format: str, base: str | None) -> None:
    """Raise BadInput for what only transformers have."""
    check_net_format(recipe, format)
    if base is not None:
        raise BadInput(f"{recipe.task.model!r} has no base; leave --base out")


def check_net_format(recipe: Recipe, format: str) -> None:
    """Raise BadInput for a format that nets on arrays do not have."""
    if format != "onnx":
        raise BadInput(
            f"{recipe.task.model!r} is a net on arrays, which --format {format} does not support; "
            "use --format onnx"
        )


def check_options(format: str, options: ExportOptions) -> None:
    """Raise BadInput for options that a format does not have."""
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if options.with_base and format != "peft":
        raise BadInput(
            f"--with-base is for --format peft; a model of --format {format} includes its base "
            "already, so leave it out"
        )
    known, quantize = QUANTISATIONS.get(format), options.quantize
    if known in (None, ("none",)) and quantize not in (None, "none"):
        able = listed(name for name, ways in QUANTISATIONS.items() if len(ways) > 1)
        raise BadInput(f"--quantize is for --format {able}, not {format}; leave one of them out")
    if not options.parity and quantize not in (None, "none"):
        raise BadInput(
            "--no-parity is for models in fp32; quantised ones are always compared, so leave it out"
        )
    if not options.parity and format in OTHER_RUNTIMES:
        raise BadInput(
            f"--no-parity is for --format hf and peft; exports of --format {format} are always "
            "compared, so leave it out"
        )
    if not options.parity and options.rows is not None:
        raise BadInput(
            "--rows names the rows of the comparison that --no-parity skips; give one of them"
        )
    if known and quantize is not None and quantize not in known:
        raise _unknown_quantisation(format, quantize, known)
    if quantize in llama_cpp.QUANTISERS:
        llama_cpp.runtime()
    if (format, quantize) == ("hf", "int8"):
        hf_int8.check_installed()


def _unknown_quantisation(format: str, quantize: str, known: tuple[str, ...]) -> BadInput:
    error = unknown("quantisation", quantize, known)
    if format != "gguf":
        return error
    return BadInput(
        f"{error}; for other types, such as Q5_K_M, run llama.cpp's llama-quantize on the f16 file"
    )


def _other_runtime(format: str, kind: TaskKind) -> Any:
    """The module that exports for a runtime other than PyTorch; None for the other formats.

    Raises BadInput for a kind of task that it does not support, and if its packages are missing.
    """
    match format:
        case "onnx":
            from fedspine.exports import onnx, onnx_decoder, onnx_graph

            onnx_graph.check_installed()
            return onnx_decoder if kind == "causal-lm" else onnx
        case "executorch":
            if kind == "causal-lm":
                raise BadInput(
                    "--format executorch is for classifiers of texts, and this run tuned a "
                    "language model; use --format hf, --format onnx, --format gguf or --format peft"
                )
            from fedspine.exports import executorch, executorch_program

            executorch_program.check_installed()
            return executorch
        case "gguf":
            from fedspine.exports import gguf

            return gguf
    return None


def check_kind(format: str, run: RunModel) -> None:
    """Raise BadInput for a model that a format does not support, and if packages are missing."""
    _other_runtime(format, run.record.kind)
    decoder, architecture = run.base.layout.decoder, run.base.config.model_type
    if format == "gguf" and not decoder:
        raise BadInput(
            f"--format gguf is for language models on decoders, and {architecture} is an encoder; "
            "use --format hf, --format onnx or --format peft"
        )
    if format == "gguf" and run.record.kind != "causal-lm":
        raise BadInput(
            f"--format gguf is for language models, and this {architecture} was tuned as a "
            "classifier; use --format hf, --format onnx or --format peft"
        )
