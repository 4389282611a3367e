"""`pydoc-topics`: a text classification set read from the running interpreter's own standard library.

Each row is one paragraph (40 to 400 characters) of a docstring, labelled with the topic of the module it documents,
and carries its source file, so that the natural partition gives a device whole files. It needs no network, no account
and no download, and on Python 3.11 holds about ten thousand rows.
"""

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 40, 400  # characters of a paragraph

TOPICS: dict[str, tuple[str, ...]] = {
    "interface": ("tkinter", "idlelib", "turtle", "turtledemo", "curses", "cmd", "argparse", "optparse", "getopt",
                  "getpass", "rlcompleter", "webbrowser", "pydoc", "tty", "pty", "sre_constants"),
    "network": ("http", "urllib", "email", "xmlrpc", "wsgiref", "socket", "socketserver", "ssl", "ftplib", "poplib",
                "imaplib", "smtplib", "smtpd", "nntplib", "telnetlib", "ipaddress", "cgi", "cgitb", "mailbox",
                "mailcap", "netrc", "uuid", "base64", "quopri", "uu", "mimetypes", "asynchat", "asyncore"),
    "language": ("ast", "inspect", "importlib", "lib2to3", "types", "typing", "dis", "code", "codeop", "abc",
                 "dataclasses", "contextlib", "functools", "enum", "copy", "copyreg", "weakref", "tokenize", "token",
                 "symtable", "pkgutil", "runpy", "compileall", "py_compile", "pyclbr", "opcode", "keyword", "modulefinder",
                 "zipimport", "imp", "site", "warnings", "traceback", "linecache", "reprlib", "operator", "_py_abc",
                 "distutils", "ensurepip", "venv", "sysconfig", "platform", "ctypes", "__future__", "pickletools",
                 "zipapp", "bdb", "pdb", "collections", "_collections_abc"),
    "concurrency": ("asyncio", "multiprocessing", "concurrent", "threading", "_threading_local", "queue", "subprocess",
                    "sched", "selectors", "signal", "contextvars", "_weakrefset"),
    "testing": ("unittest", "doctest", "trace", "tracemalloc", "timeit", "profile", "cProfile", "pstats", "logging",
                "test"),
    "text": ("re", "sre_compile", "sre_parse", "string", "textwrap", "json", "csv", "html", "xml", "difflib", "gettext",
             "locale", "encodings", "codecs", "stringprep", "configparser", "plistlib", "pprint", "shlex", "fnmatch",
             "tomllib", "tabnanny", "sgmllib", "formatter", "_markupbase", "_strptime", "chunk"),
    "files": ("os", "posixpath", "ntpath", "genericpath", "pathlib", "shutil", "zipfile", "tarfile", "gzip", "bz2",
              "lzma", "tempfile", "glob", "io", "_pyio", "sqlite3", "dbm", "pickle", "shelve", "filecmp", "fileinput",
              "stat", "aifc", "wave", "sunau", "sndhdr", "imghdr", "_compression", "xdrlib", "pipes", "crypt", "msilib"),
    "numbers": ("decimal", "_pydecimal", "fractions", "numbers", "statistics", "random", "datetime", "_pydatetime",
                "calendar", "colorsys", "heapq", "bisect", "hashlib", "hmac", "secrets", "zoneinfo", "struct", "nturl2path"),
}
