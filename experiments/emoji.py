"""Makes `emoji/{train,test}.npz`: 7,570 small colour pictures of nine classes.

The pictures are those of npm's packages emoji-datasource-{google,twitter,apple,facebook} 16.0.0,
unpacked into one folder; the classes are the categories of `emoji.json`. Each picture lies on a
plain background of a random colour, and all four drawings of one emoji are on the same side of the
split, so that those of the test set are unseen. Needs Pillow.

    for p in google twitter apple facebook; do npm pack emoji-datasource-$p@16.0.0; done
    for f in emoji-datasource-*.tgz; do tar -xzf $f; done
    python experiments/emoji.py package ../emoji
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

VENDORS = ("google", "twitter", "apple", "facebook")
SIDE, TEST = 32, 0.2


def made(source: Path, target: Path) -> None:
    rows = json.loads((source / "emoji.json").read_text(encoding="utf-8"))
    classes = sorted({row["category"] for row in rows} - {"Component"})
    rng = np.random.default_rng(0)
    sets: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "test": []}
    for row in rows:
        if row["category"] not in classes:
            continue
        side = "test" if rng.random() < TEST else "train"
        for vendor in VENDORS:
            path = source / "img" / vendor / "64" / row["image"]
            if path.exists():
                picture = drawn(path, rng.integers(0, 256, 3))
                sets[side].append((picture, classes.index(row["category"])))
    target.mkdir(parents=True, exist_ok=True)
    for side, found in sets.items():
        order = rng.permutation(len(found))
        np.savez(
            target / f"{side}.npz",
            x=np.stack([found[i][0] for i in order]),
            y=np.array([found[i][1] for i in order]),
            label_names=np.array(classes),
        )


def drawn(path: Path, background: np.ndarray) -> np.ndarray:
    picture = Image.open(path).convert("RGBA")
    under = Image.new("RGBA", picture.size, (*background.tolist(), 255))
    over = Image.alpha_composite(under, picture).convert("RGB")
    return np.asarray(over.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


if __name__ == "__main__":
    made(Path(sys.argv[1]), Path(sys.argv[2]))
