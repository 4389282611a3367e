"""Talking to an exported model in a terminal: tokens are shown as they come."""

import sys
from collections.abc import Iterable, Iterator, Sequence

from transformers import TextStreamer

from fedspine.data.dataset import ANSWERS
from fedspine.exports.load import Loaded
from fedspine.exports.predict import answered
from fedspine.lm.decoding import Decoding

ASKS = "user"


def answer_each(loaded: Loaded, texts: Sequence[str], decoding: Decoding) -> None:
    """Show the answer to each text, which knows nothing of the others."""
    for text in texts:
        answered(loaded, [(ASKS, text)], decoding, _shown(loaded))


def converse(loaded: Loaded, lines: Iterable[str], decoding: Decoding) -> None:
    """Answer line after line, each with all that was said before; an empty line begins anew."""
    said: list[tuple[str, str]] = []
    for line in lines:
        if not line.strip():
            said = []
            continue
        said.append((ASKS, line.rstrip("\n")))
        answer = answered(loaded, said, decoding, _shown(loaded)).answer
        said.append((ANSWERS, answer))


def lines_of_user() -> Iterator[str]:
    """The lines of the standard input; in a terminal each after a prompt."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _shown(loaded: Loaded) -> TextStreamer:
    return TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
