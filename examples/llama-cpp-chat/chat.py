"""Chat with a folder of `fedspine export --format gguf`, with llama-cpp-python alone.

Reads one message a line. A model without a chat template continues each line instead.
"""

import sys
from pathlib import Path

from llama_cpp import Llama

TOKENS = 256  # of an answer at most
LIKELIEST = {"max_tokens": TOKENS, "temperature": 0.0}


def main(folder):
    model = Llama(str(folder / "model.gguf"), n_ctx=0, verbose=False)  # as many as it has positions
    answers, messages = "tokenizer.chat_template" in model.metadata, []
    for line in map(str.strip, sys.stdin):
        if answers:
            messages.append({"role": "user", "content": line})
            (choice,) = model.create_chat_completion(messages, **LIKELIEST)["choices"]
            messages.append(choice["message"])
            print(choice["message"]["content"].strip(), flush=True)
        else:
            (choice,) = model.create_completion(line, **LIKELIEST)["choices"]
            print(choice["text"].strip(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
