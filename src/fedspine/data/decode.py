"""Decoding of text files: compression, byte order marks, encodings."""

import codecs
from pathlib import Path

import pyarrow as pa

from fedspine.core.errors import BadInput
from fedspine.data.parts import Unreadable

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # Arrow's name of the codec
MARKS = (  # of two with the same beginning, the longer one goes first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_of(path: Path, encoding: str | None) -> str:
    """The text of a file, which may be compressed, without its byte order mark.

    The encoding is that of the byte order mark, else `encoding`, else UTF-8. Raises BadInput for an
    unknown encoding, Unreadable for bytes that are not valid in it, OSError for a file that cannot
    be read.
    """
    if encoding is not None:
        _check(encoding)
    data = _bytes(path)
    marked = next((name for mark, name in MARKS if data.startswith(mark)), None)
    name = marked or encoding or "utf-8"
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        do = "set another one as task.encoding"
        if marked:  # which goes before any setting
            do = "repair the file, or save it again as UTF-8"
        elif encoding is None:
            do = 'if the text has another encoding, set it, such as task.encoding = "latin-1"'
        raise Unreadable(
            f"byte 0x{data[error.start]:02x} in line {line} is not {name.upper()}", do
        ) from None
    if text[:200].count("\0") > len(text[:200]) / 3:
        order = "be" if text[0] == "\0" else "le"
        size = 32 if "\0\0" in text[:200] else 16
        raise Unreadable(
            f"it holds zero bytes, as UTF-{size} does",
            f'set its encoding, such as task.encoding = "utf-{size}-{order}"',
        )
    return text


def _check(encoding: str) -> None:
    try:
        b"    ".decode(encoding)  # decoding an empty string would not check the name
    except UnicodeDecodeError:
        return
    except (LookupError, ValueError):
        raise BadInput(
            f"task.encoding is {encoding!r}, which is not a text encoding; use for example "
            "'latin-1', 'cp1252' or 'utf-16'"
        ) from None


def _bytes(path: Path) -> bytes:
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        return path.read_bytes()
    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, codec) as stream:
        return stream.read()
