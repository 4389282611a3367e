"""A process that imports everything once and then forks runs that are killed, which costs a
fraction of starting each.

Each line of stdin is a JSON object with the arguments of a run and a plan; the answer is one line
with the result. A plan is a list of attempts on one folder: the first is a new run, and those that
find the folder resume it. An attempt may be struck
- at a call of a function of `os`, before or after it does its work: killed, or failed with an
  error number,
- from outside, by a signal (a name of BLOWS) so many seconds after its folder is there,
- at a job of a worker, which ends its process or raises,
- by a limit on the bytes of a file,
- by a folder that is `read_only`, or by a wall `clock` that jumps by years at each look.
One may have `more` arguments. One that is `slow` takes so many seconds longer for each job. One
with `ignores_ctrl_c` does so, as under `nohup`. A plan with `every` is repeated with call 1, 2, ...
of its first attempt until that attempt is no longer struck.
"""

import builtins
import errno
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from processes import alive, running

from fedspine.execution.workers import Workshop
from fedspine.report.page import REPORT
from fedspine.runs import loop
from fedspine.runs.assemble import assemble
from fedspine.runs.config import load
from fedspine.ui import cli
from fedspine.ui.progress import Silent

GONE_SECONDS = 5.0  # within which a killed run's workers must have ended
POLL_SECONDS = 0.001
BLOWS = {  # signals to a run and its group
    "KILL": lambda run: os.kill(run, signal.SIGKILL),
    "INT": lambda run: os.killpg(run, signal.SIGINT),  # as a terminal does
    "TERM": lambda run: os.kill(run, signal.SIGTERM),
    # as `timeout` and service managers do
    "TERM to all": lambda run: (os.kill(run, signal.SIGTERM), os.killpg(run, signal.SIGTERM)),
}


def main():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads before the forks
    torch.set_num_threads(1)
    # whatever the tests' parent process ignores
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warm = False
    for line in sys.stdin:
        asked = json.loads(line)
        if not warm:
            warm_up(load(None, asked["arguments"][1::2]))
            warm = True
        print(json.dumps(list(carry_out_all(asked["arguments"], asked["plan"]))), flush=True)


def warm_up(recipe):
    """Import what is imported late, and do once what takes half of a small run's time."""
    assemble(recipe)
    if not torch.cuda.is_available():  # where it is, a process that has trained cannot be forked
        with tempfile.TemporaryDirectory() as folder:
            loop.new_run(recipe, Path(folder) / "run", Silent())


def carry_out_all(arguments, plan):
    if not plan.get("every"):
        yield carry_out(arguments, plan["folder"], plan["attempts"])
        return
    first, *rest = plan["attempts"]
    call, struck = 0, True
    while struck:
        call += 1
        found = carry_out(arguments, f"{plan['folder']}-{call}", [first | {"call": call}, *rest])
        struck = found["ends"][0]["code"] != 0
        yield found


def carry_out(arguments, folder, attempts):
    """How each attempt ended, its output, and the workers that outlived a kill."""
    folder, ends, orphans = Path(folder), [], []
    for attempt in attempts:
        said = folder.with_name(folder.name + ".stderr")
        resumes, started = folder.exists(), time.monotonic()
        child = fork(
            ["--resume", str(folder), *attempt.get("more", ())]
            if resumes
            else [*arguments, "--out", str(folder)],
            attempt,
            said,
        )
        workers = strike_from_outside(child, folder, attempt) if "seconds" in attempt else []
        _, status = os.waitpid(child, 0)
        code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - started
        orphans += alive(workers, GONE_SECONDS)
        ends.append(
            {
                "code": code,
                "seconds": seconds,
                "resumes": resumes,
                "said": said.read_text().splitlines(),
            }
        )
    return {"folder": str(folder), "ends": ends, "orphans": orphans}


def fork(arguments, attempt, said):
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()  # so that a signal can be sent to the run and its workers alone, as Ctrl-C does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        prepare(attempt)
        sys.argv = ["fedspine", "run", *arguments, "--json"]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def prepare(attempt):
    if not attempt.get("report"):  # which takes longer than all the rest
        loop.write_page = lambda folder: (folder / REPORT).write_text("a report")
    if attempt.get("ignores_ctrl_c"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "file_bytes" in attempt:
        resource.setrlimit(resource.RLIMIT_FSIZE, (attempt["file_bytes"], resource.RLIM_INFINITY))
    if "function" in attempt:
        strike_at(attempt)
    if "read_only" in attempt:
        make_read_only(attempt["read_only"])
    if attempt.get("clock"):
        jump = random.Random(7)
        time.time = lambda: jump.uniform(-1e9, 4e9)
        time.time_ns = lambda: int(1e9 * time.time())
    if "job" in attempt:
        strike_worker(attempt["job"], attempt["how"])
    if "slow" in attempt:
        slow_down(attempt["slow"])


def strike_at(attempt):
    """Kill this process, or raise OSError, at the given call of a function of `os`."""
    whole, count = getattr(os, attempt["function"]), 0

    def counted(*values, **options):
        nonlocal count
        count += 1
        if count == attempt["call"] and attempt["when"] == "before":
            strike(attempt.get("error"))
        result = whole(*values, **options)
        if count == attempt["call"] and attempt["when"] == "after":
            strike(attempt.get("error"))
        return result

    setattr(os, attempt["function"], counted)


def strike(error):
    if error is None:
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(error, os.strerror(error))


def make_read_only(folder):
    """Refuse every change to this folder, like a read-only file system."""

    def refuse(*paths):
        for path in paths:
            if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(folder):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def guarded(whole, writes):
        def call(*values, **options):
            if writes(*values, **options):
                refuse(*values[:2])
            return whole(*values, **options)

        return call

    for name in ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "utime"):
        setattr(os, name, guarded(getattr(os, name), lambda *_, **__: True))
    os.open = guarded(os.open, lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR))
    builtins.open = io.open = guarded(
        open, lambda path, mode="r", *_, **__: any(letter in mode for letter in "wax+")
    )


def strike_worker(job, how):
    whole, count = Workshop.do, 0

    def counted(self, *values):
        nonlocal count
        count += 1
        if count == job and how == "exit":
            os._exit(1)
        if count == job:
            raise MemoryError("no room for 8 exabytes")
        return whole(self, *values)

    Workshop.do = counted


def slow_down(seconds):
    whole = Workshop.do
    Workshop.do = lambda self, job: (time.sleep(seconds), whole(self, job))[1]


def strike_from_outside(child, folder, attempt):
    """Send a signal to a run this long after its folder is there; returns the workers it had."""
    process = psutil.Process(child)
    while not folder.exists() and running(process):
        time.sleep(POLL_SECONDS)
    time.sleep(attempt["seconds"])
    workers = process.children(recursive=True)
    BLOWS[attempt.get("signal", "KILL")](child)
    return workers


if __name__ == "__main__":
    main()
