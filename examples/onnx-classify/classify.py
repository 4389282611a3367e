"""Label texts with a folder of `fedspine export --format onnx`, without fedspine or PyTorch."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, texts = Path(sys.argv[1]), sys.argv[2:]
labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
inputs = {i.name: np.array([getattr(r, parts[i.name]) for r in rows]) for i in session.get_inputs()}
(logits,) = session.run(["logits"], inputs)
for text, label in zip(texts, logits.argmax(1), strict=True):
    print(labels[str(label)], text, sep="\t")
