"""One table of the inputs that people have, each with the data that it should give or the line that
refuses it.
"""

import bz2
import gzip
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedspine.core.errors import BadInput
from fedspine.data.tasks import load, remarks

TEXTS = [f"text {n}" for n in range(12)]


@dataclass(frozen=True)
class Case:
    """Files by their path in a folder, and the expected result; `at` is the path to load, by
    default the folder.
    """

    files: dict
    classes: dict | None = None  # rows of each class, in the order of the classes
    texts: list | None = None  # of all rows, in any order
    left_out: dict = field(default_factory=dict)
    says: tuple = ()  # each in one remark
    refused: str = ""  # in the one line that refuses it
    at: str = ""
    options: dict = field(default_factory=dict)


def rows(labels, texts=None):
    texts = texts or [f"text {n}" for n in range(len(labels))]
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


def csv(labels, separator=",", texts=None):
    lines = [f"{row['text']}{separator}{row['label']}\n" for row in rows(labels, texts)]
    return f"text{separator}label\n" + "".join(lines)


def tsv(labels):
    return csv(labels, "\t")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(labels, names=None, kind=None):
    """A Parquet file with labels of a type, and class names as `datasets` states them."""
    table = pa.table(
        {"text": [f"text {n}" for n in range(len(labels))], "label": pa.array(labels, kind)}
    )
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def arrow(table):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def saved(labels, names=None, folder="", shards=1):
    """The files of `save_to_disk` of `datasets`; test_data_cli has the package write them."""
    parts = np.array_split(np.arange(len(labels)), shards)
    files = [f"data-{n:05}-of-{shards:05}.arrow" for n in range(shards)]
    feature = (
        {"names": names, "_type": "ClassLabel"} if names else {"dtype": "string", "_type": "Value"}
    )
    return {
        f"{folder}state.json": json.dumps(
            {"_data_files": [{"filename": name} for name in files], "_split": None}
        ),
        f"{folder}dataset_info.json": json.dumps(
            {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": feature}}
        ),
    } | {
        f"{folder}{name}": arrow(
            pa.table({"text": [f"text {i}" for i in part], "label": [labels[i] for i in part]})
        )
        for name, part in zip(files, parts, strict=True)
    }


def zst(data):
    return pa.compress(data.encode(), codec="zstd", asbytes=True)


def gz(data):
    return gzip.compress(data.encode())


AB = {"a": 6, "b": 6}
WORDS = ["a", "b"] * 6
STRAY = ["text\tlabel\n"] + [
    ('"' if n in (100, 147) else "") + f"text {n}\t{'ab'[n % 2]}\n" for n in range(200)
]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
LM = {"kind": "causal-lm"}

LABELS = {
    "leading zeros are part of a label": Case(
        {"x.csv": csv(["01", "1", "2"] * 4)}, {"01": 4, "1": 4, "2": 4}
    ),
    "also in tsv": Case({"x.tsv": tsv(["01", "1", "2"] * 4)}, {"01": 4, "1": 4, "2": 4}),
    "also in json": Case({"x.jsonl": lines(rows(["01", "1", "2"] * 4))}, {"01": 4, "1": 4, "2": 4}),
    "also in parquet": Case(
        {"x.parquet": parquet(["01", "1", "2"] * 4)}, {"01": 4, "1": 4, "2": 4}
    ),
    "001 stays 001": Case({"x.csv": csv(["001", "002"] * 6)}, {"001": 6, "002": 6}),
    "true and false are texts": Case(
        {"train.csv": csv(["true", "false", "mixed"] * 4), "test.csv": csv(["true", "false"])},
        {"false": 5, "mixed": 4, "true": 5},
    ),
    "of any format": Case(
        {"train.csv": csv(["true", "false", "mixed"] * 4), "test.parquet": parquet([True, False])},
        {"false": 5, "mixed": 4, "true": 5},
    ),
    "and of any spelling": Case(
        {"train.csv": csv(["True", "False"] * 6), "test.jsonl": lines(rows([True, False]))},
        {"False": 7, "True": 7},
    ),
    "floats of csv are texts": Case(
        {"x.csv": csv(["1.0", "2.0", "n/a"] * 4)}, {"1.0": 4, "2.0": 4, "n/a": 4}
    ),
    "dates": Case(
        {"x.csv": csv(["2024-01-01", "2024-02-01"] * 6)}, {"2024-01-01": 6, "2024-02-01": 6}
    ),
    "versions": Case({"x.csv": csv(["1.10", "1.1"] * 6)}, {"1.1": 6, "1.10": 6}),
    "fractions": Case({"x.csv": csv(["0.5", "10", "2"] * 4)}, {"0.5": 4, "2": 4, "10": 4}),
    "words that other readers drop": Case(
        {"x.csv": csv(["NA", "None", "nan", "1e3", "null", "N/A"] * 2)},
        {"1e3": 2, "N/A": 2, "NA": 2, "None": 2, "nan": 2, "null": 2},
    ),
    "also in tsv, as texts": Case(
        {"x.tsv": "text\tlabel\n" + "NA\ta\nnan\tb\n" * 6}, AB, ["NA", "nan"] * 6
    ),
    "shards agree": Case(
        {"train-0.csv": csv(["1", "2"] * 3), "train-1.csv": csv(["1", "x"] * 3)},
        {"1": 6, "2": 3, "x": 3},
    ),
    "numbers in the order of their values": Case(
        {"x.csv": csv([str(n) for n in range(11)] * 2)}, {str(n): 2 for n in range(11)}
    ),
    "numbers of json are those of csv": Case(
        {"train.jsonl": lines(rows([1, 2, "x"] * 4)), "test.csv": csv(["1", "2", "x"])},
        {"1": 5, "2": 5, "x": 5},
    ),
    "whole floats of formats with types are whole numbers": Case(
        {"train.parquet": parquet([1.0, 2.0, None, float("nan")] * 3), "test.csv": csv(["1", "2"])},
        {"1": 4, "2": 4},
        left_out={"no label": 6},
        says=("6 of 14 rows are left out: 6 with no label",),
    ),
    "dates of formats with types": Case(
        {"x.parquet": parquet([19723, 19724] * 6, kind=pa.date32())},
        {"2024-01-01": 6, "2024-01-02": 6},
    ),
    "times too": Case(
        {"x.parquet": parquet([0, 86_400_000] * 6, kind=pa.timestamp("ms"))},
        {"1970-01-01": 6, "1970-01-02": 6},
    ),
    "white space around a label": Case(
        {"x.csv": csv(["neg", "neg ", "pos", " pos"] * 3)},
        {"neg": 6, "pos": 6},
        says=("white space around 6 labels of the train set is ignored",),
    ),
    "zero-width characters around a label": Case(
        {"x.csv": csv(["neg", "\ufeffneg", "pos", "\u200b"] * 3)},
        {"neg": 6, "pos": 3},
        left_out={"no label": 3},
        says=("white space around 3 labels", "3 of 12 rows are left out: 3 with no label"),
    ),
    "accents of both forms": Case(
        {"x.csv": csv(["caf\u00e9", "cafe\u0301", "no"] * 4)},
        {"caf\u00e9": 8, "no": 4},
        says=("letters and accents of 4 labels of the train set are read as one character",),
    ),
    "also where the file names them": Case(
        {
            "train.parquet": parquet([0, 1] * 6, ["cafe\u0301", "no"]),
            "test.csv": csv(["caf\u00e9"]),
        },
        {"caf\u00e9": 7, "no": 6},
    ),
    "true and false as a spreadsheet writes them": Case(
        {"train.jsonl": lines(rows([True, False] * 6)), "test.csv": csv(["TRUE", "FALSE"])},
        {"FALSE": 7, "TRUE": 7},
    ),
    "one integer, in one shard a float beside fractions": Case(
        {"part-0.parquet": parquet([1, 2] * 6), "part-1.parquet": parquet([1.0, 2.5] * 6)},
        {"1": 12, "2": 6, "2.5": 6},
    ),
    "floats that stand for no integer": Case(
        {"x.jsonl": lines(rows([1e300, 2.0] * 6))}, {"1e+300": 6, "2.0": 6}
    ),
    "a label beyond the class names": Case(
        {"x.parquet": parquet([0, 7] * 6, ["no", "yes"])},
        {"0": 6, "7": 6},
        says=("the class names 'no', 'yes' are not used, as the label 7 of 6 rows has none",),
    ),
    "times of day": Case(
        {"x.parquet": parquet([1, 2] * 6, kind=pa.time32("s"))}, {"00:00:01": 6, "00:00:02": 6}
    ),
    "bytes of one length": Case(
        {"x.parquet": parquet([b"no", b"so"] * 6, kind=pa.binary(2))}, {"no": 6, "so": 6}
    ),
    "half a character in a label": Case(
        {"x.jsonl": lines(rows(["\ud800", "b"] * 6))}, refused="found an unpaired surrogate"
    ),
    "a label as long as a book": Case(
        {"train.csv": csv(WORDS), "test.csv": csv(["y" * 5000])},
        refused=f"found '{'y' * 60}...' in column 'label' of 1 row",
    ),
    "many labels that look alike": Case(
        {"x.csv": csv([f"{c}{n}" for c in "nN" for n in range(40)] * 3)},
        says=(*(f"'N{n}' and" for n in (0, 1, *range(10, 18))), "30 more classes look like"),
    ),
    "few rows, each its own label": Case(
        {"x.csv": csv(list("abcde"))}, refused="each of the 5 rows has its own label; name another"
    ),
    "labels that look alike": Case(
        {"x.csv": csv(["neg", "Neg", "pos"] * 4)},
        {"Neg": 4, "neg": 4, "pos": 4},
        says=("'Neg' and 'neg' are two classes",),
    ),
    "an empty cell is missing": Case(
        {"x.csv": csv(["a", "", "b", "  "] * 6)},
        AB,
        left_out={"no label": 12},
        says=("12 of 24 rows are left out: 12 with no label",),
    ),
    "a null": Case({"x.jsonl": lines(rows(["a", None, "b"] * 6))}, AB, left_out={"no label": 6}),
    "a key that is not there": Case(
        {
            "x.jsonl": lines(
                [{"text": "t", "label": "a"}, {"text": "t"}, {"text": "t", "label": "b"}] * 6
            )
        },
        AB,
        left_out={"no label": 6},
    ),
    "class names": Case({"x.parquet": parquet([0, 1] * 6, ["no", "yes"])}, {"no": 6, "yes": 6}),
    "class names of labels as floats": Case(
        {"x.parquet": parquet([0.0, 1.0, None] * 6, ["yes", "no"])},
        {"yes": 6, "no": 6},
        left_out={"no label": 6},
    ),
    "the class that a contest hides": Case(
        {"x.parquet": parquet([0, 1, -1] * 6, ["no", "yes"])},
        {"no": 6, "yes": 6},
        left_out={"no label": 6},
    ),
    "-1 without class names is a class": Case(
        {"x.csv": csv(["-1", "0", "1"] * 4)}, {"-1": 4, "0": 4, "1": 4}
    ),
    "a test set of one such class is none that hides": Case(
        {"train.csv": csv(["-1", "1"] * 5), "test.csv": csv(["-1", "-1"])}, {"-1": 7, "1": 5}
    ),
    "a test set without labels": Case(
        {"train.csv": csv(WORDS), "test.csv": csv(["", ""])},
        AB,
        says=(
            "the labels of the test set are withheld, so a fifth of the training rows is used for "
            "testing",
        ),
    ),
    "a test set of -1, as floats": Case(
        {"train.parquet": parquet([0.0, 1.0] * 6), "test.parquet": parquet([-1.0, -1.0])},
        {"0": 6, "1": 6},
        says=("the labels of the test set are withheld",),
    ),
    "class names and their texts": Case(
        {
            "train.parquet": parquet([0, 1] * 5, ["pos", "neg"]),
            "test.csv": csv(["neg", "pos", "1"]),
        },
        {"pos": 6, "neg": 7},
    ),
    "a label of the test set alone": Case(
        {"train.csv": csv(WORDS), "test.csv": csv(["c"])},
        refused="found 'c' in column 'label' of 1 row",
    ),
    "every row its own label": Case(
        {"x.csv": csv([f"id {n}" for n in range(200)])},
        refused="each of the 200 rows has its own label; name another label column",
    ),
    "nearly so": Case(
        {"x.csv": csv([f"id {n // 2 * 2 if n < 80 else n}" for n in range(200)])},
        refused="expected classes in column 'label', found 160 different labels in 200 rows; name "
        "another",
    ),
}

CELLS = {
    "a quote in tsv is text": Case(
        {"x.tsv": "".join(STRAY)},
        {"a": 100, "b": 100},
        [line.split("\t")[0] for line in STRAY[1:]],
    ),
    "also where it is closed": Case(
        {"x.tsv": "text\tlabel\n" + '"all of it"\ta\n"this" too\tb\n' * 6},
        AB,
        ['"all of it"', '"this" too'] * 6,
    ),
    "tsv with quotes that enclose": Case(
        {"x.tsv": "text\tlabel\n" + '"two\nlines"\ta\n"a\ttab"\tb\n' * 6},
        AB,
        ["two\nlines", "a\ttab"] * 6,
        says=("values are enclosed in quotes", "6 rows of several lines each, 12 in all"),
    ),
    "tsv as R writes it": Case(
        {"x.tsv": '"text"\t"label"\n' + '"fine"\t"a"\n"bad"\t"b"\n' * 6}, AB, ["fine", "bad"] * 6
    ),
    "two quotes in csv that enclose nothing": Case(
        {"x.csv": "".join(STRAY).replace("\t", ",")},
        {"a": 100, "b": 100},
        [line.split("\t")[0] for line in STRAY[1:]],
        says=("x.csv: a quote that does not enclose a whole value is read as text in 2 lines",),
    ),
    "quotes within a cell of csv": Case(
        {"x.csv": "text,label\n" + '"Good" film,a\n5" wide,b\n' * 6},
        AB,
        ['"Good" film', '5" wide'] * 6,
    ),
    "quotes after a backslash": Case(
        {"x.csv": "text,label\n" + '"a \\"b\\", c",a\nfine,b\n' * 6}, AB, ['a "b", c', "fine"] * 6
    ),
    "cells of several lines": Case(
        {"x.csv": "text,label\n" + '"one\ntwo\n",a\n"a ""b""",b\n' * 6},
        AB,
        ["one\ntwo\n", 'a "b"'] * 6,
        says=("x.csv: quotes enclose 6 rows of several lines each, 18 in all",),
    ),
    "a quoted word in the only column": Case(
        {"x.csv": "text\n" + '"Good" film\nfine\n' * 3},
        texts=['"Good" film', "fine"] * 3,
        options=LM,
    ),
    "one such quote": Case(
        {"x.csv": csv(WORDS).replace("text 3", '"text 3')},
        AB,
        [t if t != "text 3" else '"text 3' for t in TEXTS],
        says=("x.csv: a quote that does not enclose a whole value is read as text in 1 line",),
    ),
    "a torn file": Case(
        {"x.csv": csv(WORDS) + '"torn, a'},
        refused="a quote opens a value in line 14 and is never closed",
    ),
    "a quote in the only column": Case(
        {"x.csv": 'text\n"one\ntwo\n"three\n'},
        options=LM,
        refused="as csv: a quote opens a value in line 2 and is closed in the middle of one, so "
        "that 3 lines would be one row",
    ),
    "a quote that nothing closes": Case(
        {"x.csv": csv(WORDS) + '"torn\nlast,b\n'},
        refused="as csv: a quote opens a value in line 14 and is never closed, so that 2 lines "
        "would be one",
    ),
    "a row that is too long": Case(
        {"x.csv": csv(WORDS) + "one, two,a\n"},
        refused="as csv: line 14 has 3 values, the header 2; put values",
    ),
    "a row that is too short": Case(
        {"x.tsv": tsv(WORDS) + "one\n"},
        refused="as tsv: line 14 has 1 value, the header 2; put values",
    ),
    "empty cells behind a row": Case({"x.csv": csv(WORDS).replace(",a\n", ",a,,\n")}, AB, TEXTS),
    "empty rows of a spreadsheet": Case(
        {"x.csv": csv(WORDS) + ",\n,\n\n"}, AB, TEXTS, {"no label": 2}
    ),
    "an empty text": Case({"x.csv": csv(WORDS) + ",a\n \t,b\n"}, AB, TEXTS, {"no text": 2}),
    "semicolons": Case(
        {"x.csv": csv(WORDS, ";", ["a, b"] * 12)},
        AB,
        ["a, b"] * 12,
        says=("x.csv: values are separated by semicolons",),
    ),
    "semicolons, with a comma in another name": Case(
        {"x.csv": "text;label;m,n\n" + "a;a;1\nb;b;2\n" * 6}, AB, ["a", "b"] * 6
    ),
    "vertical bars": Case(
        {"x.csv": csv(WORDS, "|")},
        AB,
        TEXTS,
        says=("x.csv: values are separated by vertical bars",),
    ),
    "spaces": Case(
        {"x.csv": csv(WORDS, " ")},
        refused="the columns text label; separate values by commas, semicolons, tabs or",
    ),
    "a quoted remark on semicolons": Case({"x.csv": '"sep=;"\n' + csv(WORDS, ";")}, AB, TEXTS),
    "lines of white space": Case({"x.csv": csv(WORDS) + "\n \n\t\n"}, AB, TEXTS),
    "also in tsv, lines of white space": Case({"x.tsv": tsv(WORDS) + "\n  \n"}, AB, TEXTS),
    "carriage returns in a text": Case(
        {"x.tsv": "text\tlabel\n" + "a\rb\ta\nc\tb\n" * 6},
        AB,
        ["a\rb", "c"] * 6,
        says=("read as text: 6 carriage returns",),
    ),
    "carriage returns in the only column": Case(
        {"x.csv": "text\r\n" + "a\rb\r\nc\r\n" * 3}, texts=["a\rb", "c"] * 3, options=LM
    ),
    "line ends of two kinds": Case(
        {"x.csv": csv(WORDS[:6]) + csv(WORDS[6:]).partition("\n")[2].replace("\n", "\r")}, AB
    ),
    "a zero byte in a text": Case({"x.csv": csv(WORDS, texts=["a\0b"] * 12)}, AB, ["a\0b"] * 12),
    "a name with letters that look the same": Case(
        {"x.csv": csv(WORDS).replace("text,label", "t\u0435xt,label")},
        refused="did you mean 't\u0435xt', which is 't\\u0435xt'?",
    ),
    "names in quotes, wide letters": Case(
        {"x.csv": csv(WORDS).replace("text,label", '"text" ,\uff4cabel')}, AB, TEXTS
    ),
    "semicolons, as a spreadsheet says it": Case(
        {"x.csv": "sep=;\r\n" + csv(WORDS, ";")}, AB, TEXTS
    ),
    "which says no more": Case({"x.csv": "sep=;\r\n"}, refused="as csv: it is empty"),
    "tabs in csv": Case(
        {"x.csv": csv(WORDS, "\t")}, AB, TEXTS, says=("x.csv: values are separated by tabs",)
    ),
    "commas in tsv": Case({"x.tsv": csv(WORDS)}, AB, TEXTS),
    "spaces around names": Case(
        {"x.csv": csv(WORDS).replace("text,label", " text , label")}, AB, TEXTS
    ),
    "spaces after commas": Case(
        {"x.csv": "text, label\n" + '"a, b", a\nc, b\n' * 6}, AB, ["a, b", "c"] * 6
    ),
    "names that differ in white space only": Case(
        {
            "x.csv": csv(WORDS)
            .replace("text,label", "text,label ")
            .replace("\n", ",x\n")
            .replace("label ,x", "label ,label\u00a0")
        },
        refused="expected one column 'label' in the train set, found several, which differ only "
        "in white space",
    ),
    "windows line ends": Case({"x.csv": csv(WORDS).replace("\n", "\r\n")}, AB, TEXTS),
    "old line ends": Case({"x.csv": csv(WORDS).replace("\n", "\r")}, AB, TEXTS),
    "other line separators are text": Case(
        {"x.csv": csv(WORDS, texts=["a\u2028b\x0bc\x85d"] * 12)}, AB, ["a\u2028b\x0bc\x85d"] * 12
    ),
}

ENCODED = {
    "utf-8 with a mark, csv": Case({"x.csv": csv(WORDS).encode("utf-8-sig")}, AB, TEXTS),
    "utf-8 with a mark, tsv": Case({"x.tsv": tsv(WORDS).encode("utf-8-sig")}, AB, TEXTS),
    "utf-8 with a mark, json": Case({"x.jsonl": lines(rows(WORDS)).encode("utf-8-sig")}, AB, TEXTS),
    "utf-8 with a mark, a list": Case(
        {"x.json": json.dumps(rows(WORDS)).encode("utf-8-sig")}, AB, TEXTS
    ),
    "utf-16": Case({"x.csv": csv(WORDS).encode("utf-16")}, AB, TEXTS),
    "utf-16, big end first": Case(
        {"x.tsv": b"\xfe\xff" + tsv(WORDS).encode("utf-16-be")}, AB, TEXTS
    ),
    "utf-16 json": Case({"x.jsonl": lines(rows(WORDS)).encode("utf-16")}, AB, TEXTS),
    "utf-16 without a mark": Case(
        {"x.csv": csv(WORDS).encode("utf-16-le")},
        refused='set its encoding, such as task.encoding = "utf-16-le"',
    ),
    "utf-16 without a mark, big end first": Case(
        {"x.csv": csv(WORDS).encode("utf-16-be")},
        refused='set its encoding, such as task.encoding = "utf-16-be"',
    ),
    "utf-16 with a mark, torn": Case(
        {"x.csv": csv(WORDS).encode("utf-16") + b"\0"},
        refused="is not UTF-16; repair the file, or save it again as UTF-8",
    ),
    "and named": Case(
        {"x.csv": csv(WORDS).encode("utf-16-le")}, AB, TEXTS, options={"encoding": "utf-16-le"}
    ),
    "latin-1": Case(
        {"x.csv": csv(WORDS, texts=["café"] * 12).encode("latin-1")},
        refused="as csv: byte 0xe9 in line 2 is not UTF-8; if the text has another encoding, "
        "set it, such as "
        'task.encoding = "latin-1"',
    ),
    "latin-1, named": Case(
        {"x.csv": csv(WORDS, texts=["café"] * 12).encode("latin-1")},
        AB,
        ["café"] * 12,
        options={"encoding": "latin-1"},
    ),
    "no encoding": Case(
        {"x.csv": csv(WORDS)},
        options={"encoding": "latin1252"},
        refused="which is not a text encoding",
    ),
    "no name of an encoding": Case(
        {"x.csv": csv(WORDS)}, options={"encoding": "a\0b"}, refused="is not a text encoding"
    ),
    "not of text": Case(
        {"x.csv": csv(WORDS)}, options={"encoding": "zip"}, refused="which is not a text encoding"
    ),
    "csv.gz": Case({"x.csv.gz": gz(csv(WORDS))}, AB, TEXTS),
    "tsv.gz": Case({"x.tsv.gz": gz(tsv(WORDS))}, AB, TEXTS),
    "jsonl.gz": Case({"x.jsonl.gz": gz(lines(rows(WORDS)))}, AB, TEXTS),
    "json.gz": Case({"x.json.gz": gz(json.dumps(rows(WORDS)))}, AB, TEXTS),
    "ndjson.zst": Case({"x.ndjson.zst": zst(lines(rows(WORDS)))}, AB, TEXTS),
    "csv.zst": Case({"x.csv.zst": zst(csv(WORDS))}, AB, TEXTS),
    "tsv.zst": Case({"x.tsv.zst": zst(tsv(WORDS))}, AB, TEXTS),
    "csv.bz2": Case({"x.csv.bz2": bz2.compress(csv(WORDS).encode())}, AB, TEXTS),
    "gz of two members": Case({"x.csv.gz": gz(csv(WORDS)[:50]) + gz(csv(WORDS)[50:])}, AB, TEXTS),
    "splits of gz": Case(
        {"train.csv.gz": gz(csv(WORDS)), "test.csv.gz": gz(csv(["a"]))}, {"a": 7, "b": 6}
    ),
    "a compressed parquet": Case(
        {"x.parquet.gz": gzip.compress(parquet(WORDS))},
        refused="unknown file format of 'x.parquet.gz': '.gz'",
        at="x.parquet.gz",
    ),
    "a torn gz": Case({"x.csv.gz": gz(csv(WORDS * 100))[:-30]}, refused="x.csv.gz' as csv: "),
    "no gz": Case({"x.csv.gz": csv(WORDS)}, refused="x.csv.gz' as csv: "),
}

OBJECTS = {
    "numbers as texts": Case(
        {"x.jsonl": lines(rows(WORDS, [1, 2.5, "three"] * 4))}, AB, ["1", "2.5", "three"] * 4
    ),
    "pandas, columns": Case(
        {
            "x.json": json.dumps(
                {
                    name: {str(n): row[name] for n, row in enumerate(rows(WORDS))}
                    for name in ("text", "label")
                }
            )
        },
        AB,
        TEXTS,
    ),
    "pandas, lists": Case({"x.json": json.dumps({"text": TEXTS, "label": WORDS})}, AB, TEXTS),
    "pandas, rows by name": Case(
        {"x.json": json.dumps({f"r{n}": row for n, row in enumerate(rows(WORDS))})}, AB, TEXTS
    ),
    "pandas, split": Case(
        {
            "x.json": json.dumps(
                {
                    "columns": ["text", "label"],
                    "index": TEXTS,
                    "data": [list(row.values()) for row in rows(WORDS)],
                }
            )
        },
        AB,
        TEXTS,
    ),
    "pandas, table": Case({"x.json": json.dumps({"schema": {}, "data": rows(WORDS)})}, AB, TEXTS),
    "splits in one object": Case(
        {"x.json": json.dumps({"train": rows(WORDS), "test": rows(["a"])})},
        refused="found one object with lists of objects: train, test; write each list to a file",
    ),
    "a table without rows": Case(
        {"x.json": '{"text": [], "label": []}'},
        refused="expected rows in the train set, found none",
    ),
    "an object of nothing": Case({"x.json": "{}"}, refused="found the columns none; name"),
    "lines that end as on an old Mac": Case(
        {"x.jsonl": lines(rows(WORDS)).replace("\n", "\r")}, AB, TEXTS
    ),
    "a number of many digits": Case(
        {"x.jsonl": f'{{"text": "a", "label": {"1" * 5000}}}\n' + lines(rows(WORDS))},
        refused="line 1: a number has more than 4,300 digits",
    ),
    "indented": Case({"x.json": json.dumps({"text": TEXTS, "label": WORDS}, indent=2)}, AB, TEXTS),
    "an indented list": Case({"x.json": json.dumps(rows(WORDS), indent=2)}, AB, TEXTS),
    "an object of something else": Case(
        {"x.json": json.dumps({f"key {n}": n for n in range(200)} | {"deep": {"a": 1}}, indent=1)},
        refused="found one object of key 0, key 1, key 2, key 3, key 4, key 5, key 6, key 7, key "
        "8, key 9 and 191 more; "
        'write it with df.to_json(path, orient="records", lines=True)',
    ),
    "too many columns to list": Case(
        {"x.jsonl": lines([{f"c{n}": 1 for n in range(200)}] * 9)},
        refused="found the columns c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 190 more; name the "
        "text column",
    ),
    "a broken line": Case(
        {"x.jsonl": lines(rows(WORDS)) + '{"text": \n'},
        refused="as jsonl: line 13: Expecting value",
    ),
    "a broken first line": Case(
        {"x.jsonl": '{"text": "a, \n' + lines(rows(WORDS))}, refused="as jsonl: line 1: "
    ),
    "rows that are none": Case({"x.jsonl": "[1]\n[2]\n"}, refused="as jsonl: Extra data"),
    "half a character": Case(
        {"x.jsonl": lines(rows(WORDS, ["\ud800"] * 12))}, refused="found an unpaired surrogate"
    ),
    "messages": Case(
        {"x.jsonl": lines([{"messages": CHAT}] * 5)},
        texts=["user: Hi\nassistant: Hello."] * 5,
        options=LM,
    ),
    "one conversation, and one to test": Case(
        {"train.jsonl": lines([{"messages": CHAT}]), "test.jsonl": lines([{"messages": CHAT[:1]}])},
        texts=["user: Hi\nassistant: Hello.", "user: Hi"],
        options=LM,
    ),
    "messages of parts": Case(
        {
            "x.jsonl": lines(
                [
                    {
                        "messages": [
                            {
                                "role": "user",
                                "content": [{"type": "text", "text": "Hi"}, {"type": "image"}],
                            }
                        ]
                    }
                ]
                * 5
            )
        },
        texts=["user: Hi"] * 5,
        options=LM,
    ),
    "messages in parquet, by name": Case(
        {"x.parquet": lambda path: pq.write_table(pa.table({"turns": [CHAT] * 5}), path)},
        texts=["user: Hi\nassistant: Hello."] * 5,
        options=LM | {"text": "turns"},
    ),
    "prompts": Case(
        {
            "x.jsonl": lines(
                [
                    {"prompt": "2 + 2 =", "completion": " 4"},
                    {"prompt": "Hi", "completion": "Hello."},
                ]
                * 3
            )
        },
        texts=["2 + 2 = 4", "Hi\nHello."] * 3,
        options=LM,
    ),
    "prompts that are lists of texts": Case(
        {"x.jsonl": lines([{"prompt": ["a"], "completion": ["b"]}] * 5)},
        options=LM | {"answers": True},
        refused="expected a text or a list of messages in column 'prompt', row 1 of the train set",
    ),
    "messages that are texts": Case(
        {"x.jsonl": lines([{"messages": ["a", "b"]}] * 5)},
        options=LM,
        refused="in column 'messages', row 1 of the train set, found ['a', 'b']; write a message",
    ),
    "other roles": Case(
        {"x.jsonl": lines([{"messages": [{"role": "bot", "content": "a"}]}] * 5)},
        options=LM | {"answers": True},
        refused="5 with no answer (roles: 'bot'; 'assistant' answers)",
    ),
    "calls of tools": Case(
        {
            "x.jsonl": lines(
                [{"messages": [CHAT[0], {"role": "assistant", "content": None}, *CHAT]}] * 5
            )
        },
        options=LM | {"answers": True},
        texts=["user: Hi\nuser: Hi\nassistant: Hello."] * 5,
        says=("5 messages of the train set without a text",),
    ),
    "half a character in messages": Case(
        {"x.jsonl": lines([{"messages": [{"role": "user", "content": "\ud800"}]}] * 5)},
        options=LM,
        refused="found an unpaired surrogate",
    ),
    "prompts of messages": Case(
        {"x.jsonl": lines([{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 5)},
        texts=["user: Hi\nassistant: Hello."] * 5,
        options=LM,
    ),
    "prompts in csv": Case(
        {"x.csv": "prompt,completion\n" + "a,b\n,\n" * 5},
        texts=["a\nb"] * 5,
        left_out={"no text": 5},
        options=LM,
    ),
    "a text goes before messages": Case(
        {"x.jsonl": lines([{"messages": CHAT, "text": "t"}] * 5)}, texts=["t"] * 5, options=LM
    ),
    "messages without labels": Case(
        {"x.jsonl": lines([{"text": "a", "messages": CHAT}] * 5)},
        refused='set task.kind = "causal-lm" for language modelling',
    ),
}

FOLDERS = {
    "one split of save_to_disk": Case(saved(WORDS), AB, TEXTS),
    "its class names": Case(saved([0, 1] * 6, ["no", "yes"], shards=2), {"no": 6, "yes": 6}, TEXTS),
    "save_to_disk of a dictionary": Case(
        {"dataset_dict.json": json.dumps({"splits": ["train", "test"]})}
        | saved([0, 1] * 6, ["no", "yes"], "train/", 2)
        | saved([1], ["no", "yes"], "test/"),
        {"no": 6, "yes": 7},
        [*TEXTS, "text 0"],
    ),
    "of which a file is gone": Case(
        {name: of for name, of in saved(WORDS, shards=2).items() if "00001-of" not in name},
        refused="found no data-00001-of-00002.arrow; save the data again",
    ),
    "without a train split": Case(
        {"dataset_dict.json": json.dumps({"splits": ["all"]})} | saved(WORDS, folder="all/"),
        refused="expected a split 'train'",
    ),
    "one file of it": Case(saved(WORDS), AB, TEXTS, at="data-00000-of-00001.arrow"),
    "shards below data, beside what the Hub adds": Case(
        {
            "dataset_infos.json": "{}",
            "README.md": "",
            ".gitattributes": "",
            "data/train-00000-of-00002.parquet": parquet(["a"] * 6),
            "data/train-00001-of-00002.parquet": parquet(["b"] * 6),
            "data/test-00000-of-00001.parquet": parquet(["a"]),
        },
        {"a": 7, "b": 6},
    ),
    "a configuration of the Hub": Case(
        {"plain_text/train-00000-of-00001.parquet": parquet(WORDS)}, AB
    ),
    "several configurations": Case(
        {"small/train.csv": csv(WORDS), "large/train.csv": csv(WORDS)},
        refused="found large/, small/; name one of these folders",
    ),
    "a folder for each split": Case(
        {
            "train/a.parquet": parquet(["a"] * 6),
            "train/b.parquet": parquet(["b"] * 6),
            "test/x.parquet": parquet(["a"]),
        },
        {"a": 7, "b": 6},
    ),
    "as the Hub converts": Case(
        {
            "default/train/0000.parquet": parquet(["a"] * 6),
            "default/train/0001.parquet": parquet(["b"] * 6),
        },
        AB,
    ),
    "parts": Case(
        {
            "part-00000-c0.snappy.parquet": parquet(["a"] * 6),
            "part-00001-c0.snappy.parquet": parquet(["b"] * 6),
            "_SUCCESS": "",
        },
        AB,
    ),
    "a folder that is called like a file": Case(
        {"x.parquet/part-0.parquet": parquet(WORDS)}, AB, at="x.parquet"
    ),
    "parts of text": Case(
        {f"part-{n}.jsonl.gz": gz(lines(rows([name] * 4))) for n, name in enumerate("abc")},
        {"a": 4, "b": 4, "c": 4},
    ),
    "a part that is gone": Case(
        {"part-00000-of-00002.csv": csv(WORDS)}, refused="expected all 2 shards of the train split"
    ),
    "a part that is gone, with a digest in the names": Case(
        {"data/train-00000-of-00002-abc123def4567890.parquet": parquet(WORDS)},
        refused="expected all 2 shards of the train split",
    ),
    "empty parts": Case(
        {"part-0.csv": csv(WORDS), "part-1.csv": "", "part-2.csv": "text,label\n"},
        AB,
        TEXTS,
        says=("1 shard of 3 without a header or a row",),
    ),
    "empty parts alone": Case(
        {"part-0.jsonl": "", "part-1.jsonl": ""},
        refused="expected rows in the train set, found none",
    ),
    "folders named after values": Case(
        {
            "train/lang=de/part-0.parquet": parquet(WORDS),
            "train/lang=en/part-0.parquet": parquet(["a"]),
        },
        {"a": 7, "b": 6},
    ),
    "some levels down": Case({"a/b/train.csv": csv(WORDS)}, AB, TEXTS),
    "other names of splits": Case(
        {"train.csv": csv(WORDS), "eval.csv": csv(["a"])}, {"a": 7, "b": 6}
    ),
    "files of no split": Case(
        {"train.csv": csv(WORDS), "train_old.csv": csv(WORDS), "config.json": "{}"},
        AB,
        TEXTS,
        says=("not read, as no split is named so: train_old.csv",),
    ),
    "a split of save_to_disk that is not read": Case(
        {"dataset_dict.json": json.dumps({"splits": ["train", "unsupervised"]})}
        | saved(WORDS, folder="train/"),
        AB,
        says=("not read, as no split is named so: unsupervised",),
    ),
    "a split of save_to_disk without rows": Case(
        {
            "dataset_dict.json": json.dumps({"splits": ["train", "test"]}),
            "test/state.json": json.dumps({"_data_files": []}),
            "test/dataset_info.json": "{}",
        }
        | saved(WORDS, folder="train/"),
        refused="expected rows in the test set, found none",
    ),
    "a link that leads nowhere": Case(
        {"train.csv": csv(WORDS), "test.csv": lambda path: path.symlink_to("gone.csv")},
        refused="test.csv' as csv: [Errno 2] No such file",
    ),
    "a pipe": Case({"x.csv": os.mkfifo}, at="x.csv", refused="is neither; name another"),
    "a format that is not read": Case(
        {"x.txt": "a"}, at="x.txt", refused="'.txt'; save it as one of .arrow, .csv"
    ),
    "files of no relation": Case(
        {f"file_{name}.csv": csv(WORDS) for name in "abcdefghijkl"},
        refused="file_a.csv, file_b.csv, file_c.csv, file_d.csv, file_e.csv, file_f.csv, "
        "file_g.csv, file_h.csv, "
        "file_i.csv, file_j.csv and 2 more; name the training file train.*",
    ),
    "the split after the name": Case(
        {"reviews_train.csv": csv(WORDS), "reviews_test.csv": csv(["a"])}, {"a": 7, "b": 6}
    ),
}

CASES = LABELS | CELLS | ENCODED | OBJECTS | FOLDERS
assert len(CASES) == sum(map(len, (LABELS, CELLS, ENCODED, OBJECTS, FOLDERS)))


def written(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_people_have_is_read_as_they_mean_it(tmp_path, name):
    case = CASES[name]
    path = written(tmp_path, case.files) / case.at
    options = {"kind": "classification"} | case.options
    if case.refused:
        with pytest.raises(BadInput) as error:
            load(str(path), **options)
        assert case.refused in str(error.value) and "\n" not in str(error.value)
        return
    data = load(str(path), **options)
    if case.classes is not None:
        labels = [*data.train.labels.tolist(), *data.test.labels.tolist()]
        assert {
            data.label_names[n]: count for n, count in sorted(Counter(labels).items())
        } == case.classes
        assert list(data.label_names) == list(case.classes)
    if case.texts is not None:
        assert Counter(data.train.texts + data.test.texts) == Counter(case.texts)
    assert data.left_out == case.left_out
    said = remarks(data)
    assert not case.says or len(said) == len(case.says)
    for expected in case.says:
        assert sum(expected in remark for remark in said) == 1, said


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    written(
        tmp_path, {f"part-{n}.csv": csv(["a", "b"], texts=[f"{n} a", f"{n} b"]) for n in range(12)}
    )
    written(tmp_path, {"test/test.csv": csv(["a"])})
    data = load(str(tmp_path), kind="causal-lm")
    order = list(data.train.texts)
    assert order == sorted(order, key=lambda text: (int(text.split()[0]), text))


def test_the_limit_of_a_cell_is_that_of_before(tmp_path):
    import csv as stdlib

    before = stdlib.field_size_limit()
    long = "long " * 50_000
    path = written(tmp_path, {"x.csv": csv(WORDS, texts=[long] * 12)}) / "x.csv"
    assert set(load(str(path), kind="classification").train.texts) == {long}
    assert stdlib.field_size_limit() == before


def test_a_hundred_thousand_rows_are_read_in_no_time(tmp_path):
    """Full AG News: 120,000 rows of some 240 characters, whose labels and texts are checked row by
    row.
    """
    import time

    texts = [f"{n} " + "word " * 47 for n in range(120_000)]
    labels = [str(n % 4) for n in range(120_000)]
    path = written(tmp_path, {"train.csv": csv(labels, texts=texts)}) / "train.csv"
    begin = time.process_time()
    assert len(load(str(path), kind="classification").train) == 96_000
    assert time.process_time() - begin < 10  # 1.1 s on a slow core
