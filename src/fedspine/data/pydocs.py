"""`pydoc-topics` and `pydoc-qa`: data sets read from the running interpreter's own standard
library, for classification and for question answering.

A row of `pydoc-topics` is one paragraph (40 to 400 characters) of a docstring, labelled with the
topic of the module it documents; on Python 3.11 there are about ten thousand. A row of `pydoc-qa`
asks what a function with its signature does, and answers with the first paragraph of its docstring;
there are about 4,300. Each row carries its source file, so that the natural partition gives a
device whole modules. They need no network, no account and no download.
"""

import ast
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedspine.core.errors import BadInput

SHORTEST, LONGEST = 40, 400  # characters of a paragraph
SHORTEST_ANSWER, LONGEST_SIGNATURE = 20, 160  # characters, in `pydoc-qa`

DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Parts of a path that are left out: tests, demos, packages installed later, and packages that newer
# Pythons have dropped (dropped modules are absent from TOPICS), so that the data changes little
# from one Python version to the next.
LEFT_OUT = frozenset(
    (
        "site-packages",
        "test",
        "tests",
        "idle_test",
        "turtledemo",
        "lib2to3",
        "distutils",
        "ensurepip",
    )
)

# Top-level module names of each topic; the order of the topics is the order of the labels.
TOPICS: dict[str, tuple[str, ...]] = {
    "interface": (
        "tkinter", "idlelib", "turtle", "curses", "cmd", "argparse", "optparse", "getopt",
        "getpass", "rlcompleter", "webbrowser", "pydoc", "tty", "pty",
    ),
    "network": (
        "http", "urllib", "email", "xmlrpc", "wsgiref", "socket", "socketserver", "ssl", "ftplib",
        "poplib", "imaplib", "smtplib", "ipaddress", "mailbox", "netrc", "uuid", "base64", "quopri",
        "mimetypes",
    ),
    "language": (
        "ast", "inspect", "importlib", "types", "typing", "dis", "code", "codeop", "abc",
        "dataclasses", "contextlib", "functools", "enum", "copy", "copyreg", "weakref", "tokenize",
        "token", "symtable", "pkgutil", "runpy", "compileall", "py_compile", "pyclbr", "opcode",
        "keyword", "modulefinder", "zipimport", "site", "warnings", "traceback", "linecache",
        "reprlib", "operator", "_py_abc", "venv", "sysconfig", "platform", "ctypes", "__future__",
        "pickletools", "zipapp", "bdb", "pdb", "collections", "_collections_abc",
    ),
    "concurrency": (
        "asyncio", "multiprocessing", "concurrent", "threading", "_threading_local", "queue",
        "subprocess", "sched", "selectors", "signal", "contextvars", "_weakrefset",
    ),
    "testing": (
        "unittest", "doctest", "trace", "tracemalloc", "timeit", "profile", "cProfile", "pstats",
        "logging",
    ),
    "text": (
        "re", "string", "textwrap", "json", "csv", "html", "xml", "difflib", "gettext", "locale",
        "encodings", "codecs", "stringprep", "configparser", "plistlib", "pprint", "shlex",
        "fnmatch", "tomllib", "tabnanny", "_markupbase", "_strptime",
    ),
    "files": (
        "os", "posixpath", "ntpath", "genericpath", "pathlib", "shutil", "zipfile", "tarfile",
        "gzip", "bz2", "lzma", "tempfile", "glob", "io", "_pyio", "sqlite3", "dbm", "pickle",
        "shelve", "filecmp", "fileinput", "stat", "wave", "_compression",
    ),
    "numbers": (
        "decimal", "_pydecimal", "fractions", "numbers", "statistics", "random", "datetime",
        "_pydatetime", "calendar", "colorsys", "heapq", "bisect", "hashlib", "hmac", "secrets",
        "zoneinfo", "struct", "nturl2path",
    ),
}  # fmt: skip


def read() -> list[tuple[str, str, str]]:
    """Every distinct paragraph of the standard library as (text, topic, file), in the order of the
    sorted file paths.

    `file` is the path below the standard library with forward slashes. A paragraph that several
    files share belongs to the first of them. Raises BadInput if the interpreter was installed
    without the sources of its library.

    >>> text, topic, file = read()[0]
    >>> topic in TOPICS and file.endswith(".py")
    True
    """
    topic_of = _topic_of()
    rows: dict[str, tuple[str, str, str]] = {}
    for file, tree in _modules():
        topic = topic_of[_module(file)]
        for text in _paragraphs(tree):
            rows.setdefault(text, (text, topic, file.as_posix()))
    return _listed(rows, "pydoc-topics")


def read_questions() -> list[tuple[str, str, str]]:
    """A question about each public function and method as (question, answer, file), in the order of
    the sorted file paths.

    A repeated question, as for a property, keeps its first answer. Raises BadInput as `read` does.
    """
    rows: dict[str, tuple[str, str, str]] = {}
    for file, tree in _modules():
        dotted = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        for signature, answer in _functions(tree, dotted):
            question = f"What does `{signature}` do?"
            rows.setdefault(question, (question, answer, file.as_posix()))
    return _listed(rows, "pydoc-qa")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Signature and first paragraph of every public function of a module or class, and those of its
    public classes.
    """
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}.{getattr(child, 'name', '')}"
        if not isinstance(child, DOCUMENTED) or child.name.startswith("_"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, name)
            continue
        signature = f"{name}({ast.unparse(child.args)})"
        answer = " ".join(re.split(r"\n\s*\n", ast.get_docstring(child) or "")[0].split())
        if len(signature) <= LONGEST_SIGNATURE and SHORTEST_ANSWER <= len(answer) <= LONGEST:
            yield signature, answer


def _topic_of() -> dict[str, str]:
    return {module: topic for topic, modules in TOPICS.items() for module in modules}


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    """The path below the library, and the tree, of every file that has a topic."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in _sources(library, _topic_of()):
        yield path.relative_to(library), _tree(path.read_bytes())


def _listed(rows: dict[str, tuple[str, str, str]], data: str) -> list[tuple[str, str, str]]:
    if not rows:
        raise BadInput(
            "expected the Python sources of the standard library in "
            f"{sysconfig.get_path('stdlib')} for {data}, found none; run a Python that "
            "was installed with its sources, or name another data set"
        )
    return list(rows.values())


def _sources(library: Path, topic_of: dict[str, str]) -> Iterator[Path]:
    # only modules with a topic are walked: packages installed in the library's folder can be many
    # times its size
    for top in sorted(library.glob("*"), key=lambda path: path.name):
        if _module(Path(top.name)) not in topic_of:
            continue
        found = (
            [top] if top.suffix == ".py" else sorted(top.rglob("*.py"), key=lambda path: path.parts)
        )
        yield from (path for path in found if LEFT_OUT.isdisjoint(path.relative_to(library).parts))


def _module(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def _tree(source: bytes) -> ast.Module:
    """The module's syntax tree, an empty one for a file that does not parse."""
    with warnings.catch_warnings(), suppress(SyntaxError, ValueError, RecursionError):
        # the library's own strings may hold escapes that Python warns of
        warnings.simplefilter("ignore")
        return ast.parse(source)
    return ast.Module(body=[], type_ignores=[])


def _paragraphs(tree: ast.Module) -> Iterator[str]:
    for node in _statements(tree):
        if isinstance(node, ast.Module | DOCUMENTED):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(paragraph.split())
                if SHORTEST <= len(text) <= LONGEST:
                    yield text


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and its statements in the order of `ast.walk`, which would visit every expression,
    too, and they are nine of ten nodes.
    """
    waiting: deque[ast.AST] = deque((tree,))
    while waiting:
        node = waiting.popleft()
        yield node
        # in the order of a node's fields
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, field, ()))
