"""Commands in processes of their own, without the seconds that each takes to import torch.

One process imports everything and waits. Each command is a fork of it: a process with its own
session, signals, files and exit, which can be killed as any other. What it starts as
`python -m MODULE` (the cells of a sweep) is a fork, too, of the process that starts it. Tests of
how a process comes up use the real command: `runs.fedspine`.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import torch
from runs import environment

from fedspine.methods import all_methods

COMMON = (
    *("fedspine.ui.cli", "fedspine.ui.sweep.work", "fedspine.runs.loop", "fedspine.exports.hf"),
    *("matplotlib.pyplot", "scipy.stats", "sklearn.linear_model"),
    "transformers.models.bert.modeling_bert",
)
POLL_SECONDS = 0.01
MANY_FILES = 4096  # above the open descriptors of the processes here


class Forked:
    """A command that was started; to be used as a `subprocess.Popen` with text pipes."""

    def __init__(self, *arguments, code=None):
        """The command `fedspine` with these arguments, or `code` as `python -c` takes it."""
        self.args = ["fedspine" if code is None else "-c", *map(str, arguments)]
        self._said = tempfile.mkdtemp(dir=_folder().name)
        self.returncode = None
        self.pid = _ask(
            start=self.args,
            code=code,
            said=self._said,
            cwd=os.getcwd(),
            environment=environment(),
        )

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_SECONDS)
        return self.returncode

    def said(self):
        """The output on stdout and stderr so far."""
        return tuple((Path(self._said) / name).read_text() for name in ("1", "2"))

    def communicate(self):
        self.wait()
        return self.said()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def forked(*arguments, **options):
    """Run a command to its end, as `runs.fedspine` does."""
    process = Forked(*arguments, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _ask(**request):
    process = _warm_process()
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@cache
def _folder():
    """The folder of the outputs until the tests end."""
    return tempfile.TemporaryDirectory(prefix="fedspine-said-")


@cache
def _warm_process():
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    atexit.register(process.communicate)  # it ends when its input ends
    return process


# --- in the process that is forked ---


def import_all():
    """Import what commands import, most of it late."""
    for module in COMMON:
        import_module(module)
    all_methods()
    torch.set_num_threads(1)


def serve():
    """Answer requests until there are no more; in a fork, return the command to start."""
    ended = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            assert threads() <= {"jemalloc_bg_thd"}, threads()
            answer = os.fork()
            if not answer:
                return asked
        else:
            answer = ended_with(asked["poll"], ended)
        print(json.dumps(answer), flush=True)
    return None


def threads():
    """The names of other threads, which a fork lacks; jemalloc restarts its own."""
    tasks = Path("/proc/self/task").glob("*")  # empty on systems other than Linux
    return {(task / "comm").read_text().strip() for task in tasks if task.name != str(os.getpid())}


def ended_with(child, ended):
    if child not in ended:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            ended[child] = os.waitstatus_to_exitcode(status)
    return ended.get(child)


def prepare(asked):
    """Give a fork the state of a freshly started command."""
    os.setsid()
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        path = os.path.join(asked["said"], str(descriptor))
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    # whatever the tests' parent process ignores
    signal.signal(signal.SIGINT, signal.default_int_handler)
    subprocess.Popen = Forking
    sys.argv = asked["start"]


class Forking(subprocess.Popen):
    """A `Popen` that runs `python -m MODULE ARGUMENT...` in a fork of this process."""

    def __init__(self, command, **options):
        if command[:2] == [sys.executable, "-m"]:
            # by then it has its files, session and signals
            options["preexec_fn"] = partial(become, *command[2:])
        super().__init__(command, **options)


def become(module, *arguments):
    """Run a module in this process, then exit."""
    code = 1
    try:
        # the last one tells `Popen` that the command has been started
        os.closerange(3, MANY_FILES)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import_all()
    if (asked := serve()) is not None:
        prepare(asked)
        if asked["code"] is None:
            runpy.run_module("fedspine", run_name="__main__", alter_sys=True)
        else:
            exec(asked["code"], {"__name__": "__main__"})
