"""A site's folder and the terms of a run."""

import pyarrow as pa
import pyarrow.parquet as pq

from fedspine.flare.run_terms import RunTerms

ROWS = [
    {"text": f"row {n} of the good words", "label": ("no", "maybe", "yes")[n % 3]}
    for n in range(60)
]
NAMES = ("maybe", "no", "yes")


def terms(**changes):
    stated = {
        "method": "fedlora",
        "kind": "classification",
        "model": "tiny",
        "model_sha256": "0" * 64,
        "layers": None,
        "precision": "fp32",
        "pooling": "cls",
        "max_tokens": 16,
        "label_names": NAMES,
    }
    return RunTerms(**stated | changes)


def written(folder, rows=ROWS, head='name = "a"', data="", more=""):
    """A site folder with a Parquet file of rows and a site file."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    text = f'{head}\n[data]\npath = "rows.parquet"\n{data}\n{more}\n'
    (folder / "fedspine-site.toml").write_text(text)
    return folder
