"""The example of a web page: a graph labels texts in a real browser, and nothing is sent."""

import functools
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from browser import Browser, installed
from places import ROOT
from tiny_models import LABELS, model_on, tiny

from fedspine.data.dataset import Rows
from fedspine.exports import bench, onnx
from fedspine.exports.hf import export, load_model, predict
from fedspine.lm.encode import encode
from fedspine.lm.tiny import VOCABULARY


def made(root, monkeypatch):
    """A folder as `fedspine export --format onnx` writes it."""
    base, tokenizer = tiny(root, "roberta")
    about = {"labels": LABELS, "kind": "classification", "max_tokens": 32, "name": "toy"}
    source = export(base, model_on(base, [4, 2], [24, 30]), tokenizer, root / "hf", **about)
    monkeypatch.setattr(bench, "peak_memory_bytes", lambda folder, tokens: 1)
    rows = encode(tokenizer, Rows(texts(8), None, None, {}), "classification", 32)
    onnx.export(source, root / "onnx", examples=rows, rows_from="texts")
    return root / "onnx"


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(" ".join(rng.choice(VOCABULARY[4:40], rng.integers(1, 20))) for _ in range(count))


@pytest.mark.slow
@pytest.mark.skipif(
    installed() is None or shutil.which("npm") is None, reason="needs Chromium and npm"
)
def test_a_web_page_labels_texts(tmp_path, monkeypatch):
    folder = made(tmp_path, monkeypatch)
    site = shutil.copytree(ROOT / "examples" / "onnx-web", tmp_path / "site")
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline")
    done = subprocess.run(["npm", "install", *quiet], cwd=site, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install onnxruntime-web: {done.stderr.strip()[-200:]}")
    shutil.copytree(folder, site / "model")
    rows = (*texts(2, seed=7), " ".join(texts(4, seed=8)))  # the last one is cut
    with served(site) as address:
        tab = Browser(tmp_path / "profile")
        try:
            tab.open(f"{address}/index.html")
            found = [labelled(tab, text) for text in rows]
        finally:
            tab.close()
    assert [label for label, _ in found] == [one.label for one in predict(load_model(folder), rows)]
    assert all(milliseconds > 0 for _, milliseconds in found)
    # only files of this site are requested, and no address contains a text
    assert all(
        one.startswith((address, "blob:", "data:")) and "?" not in one for one in tab.requests
    )
    assert [one for one in tab.complaints if "favicon" not in str(one)] == []


@contextmanager
def served(folder):
    """The address of the files in a folder; only GET is answered."""
    handler = functools.partial(SilentFiles, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class SilentFiles(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


def labelled(tab, text):
    """The page's result for a text: a label and milliseconds."""
    shown = tab.run(
        f"""(async () => {{
          const until = async (test) => {{
            for (let i = 0; i < 600 && !test(); i++) await new Promise((r) => setTimeout(r, 100));
          }};
          const [button, output] = ["button", "output"].map((one) => document.querySelector(one));
          await until(() => !button.disabled || output.value.includes("cannot"));
          document.querySelector("textarea").value = {json.dumps(text)};
          button.click();
          await until(() => !button.disabled);
          return output.value;
        }})()"""
    )
    label, milliseconds = re.fullmatch(r"(\w+), ([\d.]+) ms", shown).groups()
    return label, float(milliseconds)
