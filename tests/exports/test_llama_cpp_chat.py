"""The chat example in llama.cpp, if llama-cpp-python is installed."""

import numpy as np
import pytest
from places import ROOT
from runs import python
from tiny_models import model_on, stories

from fedspine.data.dataset import Rows
from fedspine.exports.hf import export, load_model, predict
from fedspine.lm.encode import encode

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, which builds llama.cpp")
EXAMPLE = ROOT / "examples" / "llama-cpp-chat" / "chat.py"
SAME = 20  # characters of a continuation that rounding to F16 does not change


def test_the_example_continues_a_text(tmp_path):
    from fedspine.exports import gguf

    base, tokenizer = stories()
    layers = base.layout.layers
    kept = np.resize([base.layout.heads, base.layout.heads - 1], layers).tolist()
    about = {"labels": (), "kind": "causal-lm", "max_tokens": 64, "name": "toy"}
    source = export(base, model_on(base, kept), tokenizer, tmp_path / "hf", **about)
    rows = encode(tokenizer, Rows(("Once upon a time",), None, None, {}), "causal-lm", 64)
    gguf.export(source, tmp_path / "gguf", examples=rows, rows_from="texts")
    done = python(EXAMPLE, tmp_path / "gguf", input="Once upon a time\n")
    assert done.returncode == 0, done.stderr
    (ours,) = predict(load_model(source), ["Once upon a time"], new_tokens=20)
    assert done.stdout.strip()[:SAME] == ours.continuation.strip()[:SAME]
    assert "import fedspine" not in EXAMPLE.read_text()
