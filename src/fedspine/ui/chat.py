"""Talking to an exported model in a terminal: tokens are shown as they come."""

import sys
from collections.abc import Iterable, Iterator, Sequence

from transformers import TextStreamer

from fedspine.core.errors import BadInput
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
    """Answer line after line, each with all that was said before; an empty line begins anew.

    At a terminal, a message that cannot be answered is refused, and the dialogue goes on.
    """
    said: list[tuple[str, str]] = []
    for line in lines:
        if not line.strip():
            said = []
            continue
        asked = [*said, (ASKS, line.rstrip("\r\n"))]
        try:
            answer = answered(loaded, asked, decoding, _shown(loaded)).answer
        except BadInput as error:
            if not sys.stdin.isatty():
                raise
            print(f"fedspine: {error}", file=sys.stderr)
            continue
        said = [*asked, (ANSWERS, answer)]


def lines_of_user() -> Iterator[str]:
    """The lines of the standard input; in a terminal each after a prompt.

    Raises BadInput for a line that is not UTF-8.
    """
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, start=1):
            yield _decoded(line, number)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("fedspine: this line is not UTF-8; write it again", file=sys.stderr)


def _decoded(line: bytes, number: int) -> str:
    try:
        # editors mark the beginning of a file
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise BadInput(
            f"line {number} of the standard input is not UTF-8; give one message per line, as "
            "UTF-8 text"
        ) from None


def _shown(loaded: Loaded) -> TextStreamer:
    return TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
