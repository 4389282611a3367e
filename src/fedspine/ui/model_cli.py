"""`fedspine export`, `predict`, `bench` and `lm-eval`: deployed models."""

import dataclasses
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedspine.core.errors import BadInput
from fedspine.core.process import ends_on_signal
from fedspine.ui.options import Json, ModelFolder, RunFolder, Threads, print_table


@ends_on_signal()
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="New folder for the model.")],
    device: Annotated[
        str, typer.Option(help="A device's id, `global`, or `dense` (unpruned).")
    ] = "global",
    format: Annotated[
        str,
        typer.Option(
            help="hf (merged model), onnx (the same as a graph; nets on arrays, too), executorch "
            "(classifiers of texts), gguf (the same for llama.cpp) or peft (adapter and base name)."
        ),
    ] = "hf",
    with_base: Annotated[
        bool,
        typer.Option(
            "--with-base", help="With --format peft: also write the base that the adapter fits."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Where the run's base is now, if it has moved."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="With --format hf: none (fp32) or int8; with onnx also fp16 and int8-static "
            "(calibrated on the run's training rows; of the two the faster for nets on arrays); "
            "with gguf: f16, q8_0 or q4_k_m. Default: the first.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Data to compare the export with the run's model on; default: the run's test "
            "rows.",
        ),
    ] = None,
    parity: Annotated[
        bool,
        typer.Option(
            "--parity/--no-parity",
            help="With --format hf or peft: whether the export is compared with the run's model "
            "and measured; the other formats always are.",
        ),
    ] = True,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Repository of the Hugging Face Hub to push it to."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: a new repository is private.")
    ] = False,
    json: Json = False,
) -> None:
    """Write one deployed model of a run to a folder: merged, physically smaller, ready for predict
    and bench.
    """
    from fedspine.ui import python

    if private and push_to_hub is None:
        raise BadInput("--private is for --push-to-hub; leave it out, or name a repository")
    found = python.export(
        folder,
        to,
        device=device,
        format=format,
        with_base=with_base,
        base=base,
        quantize=quantize,
        rows=rows,
        parity=parity,
        push_to_hub=push_to_hub,
        private=private,
    )
    if json:
        print(jsonlib.dumps(found))
        return
    parity = found.pop("parity", None)
    print_table(f"exported to {to}", [(key, str(value)) for key, value in found.items()])
    if parity is not None:
        print(parity["line"])


@ends_on_signal()
def predict(
    folder: ModelFolder,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT...",
            help="Texts to label, to continue or to answer; put -- before one that begins with a "
            "dash. Without texts, a model tuned on dialogues reads one message per line from stdin "
            "and keeps the dialogue.",
            show_default=False,
        ),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Second text of each pair, in order; for models of text pairs."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of new tokens; default: 40, or 256 for an answer.", min=1
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: greedy decoding.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**63 - 1)] = 0,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="For a net on arrays: an .npy or .npz file, a folder, or a run's folder for its "
            "test rows.",
        ),
    ] = None,
    row: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Number of a row in --rows, from 0; may be repeated. Default: all rows.",
            min=0,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Label, continue or answer texts with an exported model, or label rows of arrays."""
    from fedspine.exports.hf import load_model
    from fedspine.exports.loaded import LoadedNet
    from fedspine.exports.predict import decoding_for, only_for_language
    from fedspine.exports.predict import predict as ask
    from fedspine.storage.records import plain
    from fedspine.ui.chat import answer_each, converse, lines_of_user

    loaded = load_model(folder)
    if loaded.kind != "causal-lm":
        only_for_language(folder, tokens, temperature)
    if isinstance(loaded, LoadedNet):
        from fedspine.ui.rows import print_labels

        if texts or pair or rows is None:
            raise BadInput(
                f"{folder} is {loaded.net}, a net on arrays, which reads no texts; give rows with "
                "--rows FILE, or --rows RUN for the test rows of its run"
            )
        print_labels(loaded, rows, row or (), json=json)
        return
    if rows is not None or row:
        raise BadInput(
            f"--rows and --row are for nets on arrays, and {folder} reads texts; give texts after "
            "the folder"
        )
    if loaded.chat and not json and not pair:
        decoding = decoding_for(loaded, tokens, temperature, seed)
        if texts:
            answer_each(loaded, texts, decoding)
        else:
            converse(loaded, lines_of_user(), decoding)
        _say_runtime(loaded)
        return
    if not texts:
        raise BadInput("no text was given; give at least one text after the folder")
    predictions = ask(loaded, texts, pair, new_tokens=tokens, temperature=temperature, seed=seed)
    found = [dataclasses.asdict(prediction) for prediction in predictions]
    _say_runtime(loaded)
    if json:
        print(jsonlib.dumps(plain({"predictions": found})))
        return
    table = Table("text", *found[0])
    for text, entry in zip(texts, found, strict=True):
        table.add_row(
            escape(text),
            *(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in entry.values()),
        )
    Console().print(table)


def _say_runtime(loaded: Any) -> None:
    """A line if not llama.cpp computed a GGUF file; after the results, since of bad input nothing
    else is printed than what is wrong.
    """
    from fedspine.exports.llama_cpp import EXTRA
    from fedspine.exports.loaded import READ_BACK

    if loaded.runtime == READ_BACK:
        print(f"computed by {loaded.runtime}; for llama.cpp itself {EXTRA}", file=sys.stderr)


@ends_on_signal()
def bench(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders that `fedspine export` made."),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Another exported model; the two are measured alternately."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens per row; default: 128.", min=1, show_default=False)
    ] = None,
    threads: Threads = 1,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Data that all models predict, or a run's folder for its test rows; default: "
            "random words or numbers.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure exported models on this machine: latency at batch 1 and 32, file size, peak memory,
    parameters. Several models are measured alternately and predict the same rows, in one table.
    """
    from fedspine.exports import bench as benches
    from fedspine.report.bench_tables import bench_table, benches_table
    from fedspine.storage.records import plain

    if against is not None and (len(folders) > 1 or rows is not None):
        raise BadInput(
            "--against takes one folder and no --rows; leave it out and name all folders"
        )
    if len(folders) > 1 or rows is not None:
        measured = benches.bench_all(folders, tokens=tokens, threads=threads, rows=rows)
        entries = [
            {"folder": str(folder), **dataclasses.asdict(one)}
            | {"same_rows": dataclasses.asdict(rows_of)}
            for folder, (one, rows_of) in zip(folders, measured, strict=True)
        ]
        if json:
            print(jsonlib.dumps(plain({"models": entries})))
        else:
            Console().print(benches_table(entries))
        return
    (folder,) = folders
    if against is None:
        found = {"model": dataclasses.asdict(benches.bench(folder, tokens=tokens, threads=threads))}
    else:
        found = benches.compare(folder, against, tokens=tokens, threads=threads).table()
    if json:
        print(jsonlib.dumps(found))
        return
    Console().print(bench_table(found))


@ends_on_signal()
def lm_eval(
    folder: ModelFolder,
    tasks: Annotated[str, typer.Option(help="Names of tasks, separated by commas.")],
    include: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with your own task files; the tasks that come with lm_eval are then "
            "unavailable.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of rows of each task; default: all.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows per batch.", min=1)] = 1,
    json: Json = False,
) -> None:
    """Score an exported language model with EleutherAI's lm_eval, on its tasks or your own."""
    from fedspine.exports.harness import evaluate
    from fedspine.storage.records import plain

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise BadInput("--tasks names no task; give at least one")
    found = evaluate(folder, names, include=include, limit=limit, batch=batch)
    if json:
        print(jsonlib.dumps(plain({"results": found})))
        return
    table = Table("task", "metric", "value")
    for task, metrics in found.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(escape(task), escape(metric.removesuffix(",none")), f"{value:.4f}")
    Console().print(table)
