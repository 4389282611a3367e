"""What lies in a folder, while another process works there too."""

import os
import threading
from itertools import cycle

from fedspine.storage.files import is_special

PASSES = 2000  # enough: with three looks at each file, it failed every time


def test_a_file_that_goes_while_it_is_looked_at_is_not_special(tmp_path) -> None:
    ended = threading.Event()

    def make_and_remove() -> None:
        for name in cycle("abc"):
            if ended.is_set():
                return
            (tmp_path / name).write_bytes(b"")
            (tmp_path / name).unlink()

    other = threading.Thread(target=make_and_remove)
    other.start()
    try:
        assert not any(is_special(path) for _ in range(PASSES) for path in tmp_path.iterdir())
    finally:
        ended.set()
        other.join()


def test_pipes_are_special_and_files_folders_and_links_are_not(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, target in (("to pipe", "pipe"), ("to file", "file"), ("to nothing", "nothing")):
        (tmp_path / name).symlink_to(target)
    found = {path.name for path in tmp_path.iterdir() if is_special(path)}
    assert found == {"pipe", "to pipe"}
