"""Length-prefixed messages over a socket; free of torch."""

import socket
import time

MOST_BYTES = 1 << 30  # of one message
LENGTH = 8  # bytes before each message, its length


def send(connection: socket.socket, payload: bytes, end: float | None = None) -> None:
    """Send one message; raises TimeoutError at `end` on the monotonic clock, OSError if the peer is
    gone.
    """
    _until(connection, end)
    connection.sendall(len(payload).to_bytes(LENGTH, "big") + payload)


def receive(connection: socket.socket, end: float | None = None) -> bytes:
    """The next message; raises as `send` does, and ConnectionError where one of more than
    MOST_BYTES is announced, of which nothing is read.
    """
    length = int.from_bytes(_read(connection, LENGTH, end), "big")
    if length > MOST_BYTES:
        raise ConnectionError(
            f"a message of {length} bytes was announced; at most {MOST_BYTES} are read"
        )
    return bytes(_read(connection, length, end))


def _read(connection: socket.socket, length: int, end: float | None) -> bytearray:
    buffer = bytearray(length)
    view, got = memoryview(buffer), 0
    while got < length:
        _until(connection, end)
        count = connection.recv_into(view[got:])
        if not count:
            raise ConnectionResetError("the other side ended")
        got += count
    return buffer


def _until(connection: socket.socket, end: float | None) -> None:
    if end is None:
        connection.settimeout(None)
        return
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
