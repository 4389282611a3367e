"""Chat with a folder of `fedspine export --format onnx`, without fedspine or PyTorch.

Reads one message a line. A model that was not tuned on dialogues continues each line instead.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

TOKENS = 256  # of an answer at most


class Decoder:
    """A graph and its tokenizer, which writes the likeliest tokens after those that are given."""

    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.ends = set(read(folder, "generation_config.json")["eos_token_id"])
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        self.names = [output.name for output in self.session.get_outputs()]

    def write(self, ids, tokens):
        """Yield at most `tokens` new tokens, one step of the graph for each."""
        past, new, seen = self.empty(), list(ids), 0
        for _ in range(tokens):
            seen += len(new)
            inputs = {"input_ids": np.array([new]), "attention_mask": np.ones((1, seen), np.int64)}
            found = dict(zip(self.names, self.session.run(None, inputs | past), strict=True))
            new = [int(found.pop("logits")[0, -1].argmax())]
            past = {name.replace("present", "past_key_values"): one for name, one in found.items()}
            if new[0] in self.ends:
                return
            yield new[0]

    def empty(self):
        """Caches without a token; layers may have other numbers of heads."""
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), types[one.type])
            for one in self.session.get_inputs()
            if one.name.startswith("past_key_values")
        }


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def template_of(folder):
    """The chat template, as transformers renders it; None for a model that continues texts."""
    if not read(folder, "config.json")["fedspine"]["chat"]:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    settings = read(folder, "tokenizer_config.json")
    named = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return environment.from_string(source, globals={k: v for k, v in named.items() if v})


def main(folder):
    decoder, template, messages = Decoder(folder), template_of(folder), []
    for line in map(str.strip, sys.stdin):
        if template is None:
            prompt = decoder.tokenizer.encode(line)
        else:
            messages.append({"role": "user", "content": line})
            text = template.render(messages=messages, add_generation_prompt=True)
            prompt = decoder.tokenizer.encode(text, add_special_tokens=False)
        answer = decoder.tokenizer.decode(list(decoder.write(prompt.ids, TOKENS))).strip()
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
