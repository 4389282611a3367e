"""Makes `{reviews,tweets,editorials}/{train,test}.csv`: short texts, positive or negative.

The texts come with the ratings of 20 readers in the package vaderSentiment 0.5 (MIT; Hutto and
Gilbert, ICWSM 2014): sentences of product reviews, tweets, and sentences of editorials. The label
is the sign of the mean rating; texts rated 0 are left out. All sentences of one review or editorial
are on the same side of the split.

    pip download vaderSentiment==0.5 --no-deps --no-binary :all:
    unzip vaderSentiment-0.5.zip
    tar -xzf vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz
    python experiments/snippets.py hutto_ICWSM_2014 ../snippets
"""

import csv
import sys
from pathlib import Path

import numpy as np

SETS = {"amazonReviewSnippets": "reviews", "tweets": "tweets", "nytEditorialSnippets": "editorials"}
TEST = 0.2


def made(source: Path, target: Path) -> None:
    for name, folder in SETS.items():
        lines = (source / f"{name}_GroundTruth.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines]
        ids = sorted({number.split("_")[0] for number, _, _ in rows})
        draws = np.random.default_rng(0).random(len(ids))
        held_out = {number for number, draw in zip(ids, draws, strict=True) if draw < TEST}
        written(rows, held_out, target / folder)


def written(rows: list[list[str]], held_out: set[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("train", "test"):
        with (folder / f"{side}.csv").open("w", encoding="utf-8", newline="") as file:
            sheet = csv.writer(file)
            sheet.writerow(("text", "label"))
            for number, rating, text in rows:
                if (number.split("_")[0] in held_out) == (side == "test") and float(rating) != 0:
                    sheet.writerow((text, "positive" if float(rating) > 0 else "negative"))


if __name__ == "__main__":
    made(Path(sys.argv[1]), Path(sys.argv[2]))
