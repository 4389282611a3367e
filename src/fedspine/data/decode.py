"""From the bytes of a text file to its text: compression, byte order marks, encodings."""

import codecs
from pathlib import Path

import pyarrow as pa

from fedspine.core.errors import BadInput
from fedspine.data.parts import Unreadable

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # Arrow's name of the codec
MARKS = (  # the longer one of two that begin alike goes first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_of(path: Path, encoding: str | None) -> str:
    """The text of a file, which may be compressed, without its byte order mark.

    It is UTF-8, or what its byte order mark says, or else in `encoding`. Raises BadInput for an
    unknown encoding, Unreadable for bytes that are no text in it, OSError for a file that cannot be
    read.
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
        do = (
            'if it is text in another encoding, name that, such as task.encoding = "latin-1"'
            if encoding is None
            else "name another one as task.encoding"
        )
        raise Unreadable(
            f"byte 0x{data[error.start]:02x} in line {line} is not {name.upper()}", do
        ) from None
    if "\0" in text[:200]:
        raise Unreadable(
            "it holds zero bytes, as UTF-16 does",
            'name its encoding, such as task.encoding = "utf-16-le"',
        )
    return text


def _check(encoding: str) -> None:
    try:
        b"    ".decode(encoding)  # nothing at all would be decoded without a look at the name
    except UnicodeDecodeError:
        return
    except LookupError:
        raise BadInput(
            f"task.encoding is {encoding!r}, which is no encoding of text; say for example "
            "'latin-1', 'cp1252' or 'utf-16'"
        ) from None


def _bytes(path: Path) -> bytes:
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        return path.read_bytes()
    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, codec) as stream:
        return stream.read()
