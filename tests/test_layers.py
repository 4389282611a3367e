"""Arrows between the parts of the project go one way; read from the imports, so that nobody has to remember."""

import ast
from pathlib import Path

import pytest

import fedspine

SOURCE = Path(fedspine.__file__).parent
KERNEL = {"errors", "message", "device", "fleet", "task", "tensors", "method"}

# what each part may import from fedspine; a part is a folder, or a file beside them
ARROWS = {
    "errors": set(),
    "schema": set(),
    "strict": {"errors"},
    "message": set(),
    "device": {"message"},
    "fleet": {"device"},
    "process": {"errors"},
    "task": set(),
    "tensors": {"message"},
    "method": {
        "device",
        "errors",
        "fleet",
        "tensors",
        "methods",
    },  # methods: found by name, when asked for
    "planning": {"errors", "message"},
    "data": {"errors", "task"},
    "lm": {
        "data",
        "device",
        "errors",
        "message",
        "planning",
        "process",
        "split",
        "task",
        "tensors",
    },
    "split": {"device", "errors", "fleet", "message", "task", "tensors"},
    "nets": {"errors", "lm", "message", "split", "task", "tensors"},
    "methods": {"planning", "lm", "nets", "split"} | KERNEL,
    "records": {"errors"},
    "store": {"errors", "message"},
    "fleets": {"data", "lm", "nets", "process", "records", "schema", "store", "strict"} | KERNEL,
    "recipes": set(),
    "config": {"errors", "method", "recipes", "strict", "task"},
    "eta": {"config"},
    "report": {"errors"},
    "__init__": set(),
}
# the rest puts the parts together: it may import all of them, and no part above may import it
TOGETHER = {
    *(
        "build",
        "cli",
        "compare",
        "ending",
        "data_cli",
        "demo",
        "doubts",
        "device_scores",
        "export",
        "fleet_cli",
        "fleet_demo",
        "folder",
        "reading",
        "references",
        "run",
        "scoring",
        "sweep",
        "task_record",
        "venue",
    ),
    "__main__",
}


def part_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path, *, types_too=False):
    """The dotted names that a file imports, wherever in it; those only type checkers see only if asked for."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types_too:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


FILES = sorted(SOURCE.rglob("*.py"))


def importers(package):
    """The files that import a package, or something in it."""
    return {
        str(path.relative_to(SOURCE))
        for path in FILES
        if any(
            name == package or name.startswith(package + ".")
            for name in imports(path, types_too=True)
        )
    }


def test_every_part_has_its_place():
    assert {part_of(path) for path in FILES} == set(ARROWS) | TOGETHER


def test_the_arrows_have_no_circle():
    # `method` finds the methods by name, which is the one arrow that turns back
    left = ARROWS | {"method": ARROWS["method"] - {"methods"}}
    while left:
        free = [part for part, allowed in left.items() if not allowed & set(left)]
        assert free, f"a circle among {sorted(left)}"
        left = {part: allowed for part, allowed in left.items() if part not in free}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if part_of(path) in ARROWS],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_imports_follow_the_arrows(path):
    own = {name.split(".")[1] for name in imports(path) if name.startswith("fedspine.")}
    assert own <= ARROWS[part_of(path)] | {part_of(path)}


def test_only_the_command_line_and_runs_draw_reports():
    allowed = {
        "cli.py",
        "compare",
        "demo.py",
        "device_scores.py",
        "doubts.py",
        "run.py",
        "report",
        "sweep",
    }
    assert {file.split("/")[0] for file in importers("fedspine.report")} <= allowed


def test_planning_never_imports_models():
    for path in (SOURCE / "planning").rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path, types_too=True)}
        assert not used & {"torch", "transformers", "safetensors"}, path


def test_methods_know_no_fleet_export_or_report():
    for path in (SOURCE / "methods").rglob("*.py"):
        used = {".".join(name.split(".")[:2]) for name in imports(path, types_too=True)}
        assert not used & {
            "fedspine.fleets",
            "fedspine.export",
            "fedspine.report",
            "fedspine.runs.loop",
        }, path


def test_nothing_is_unpickled():
    # Only direct uses: pipes to our own worker processes, forked on the same machine, pickle inside multiprocessing.
    for package in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
        assert importers(package) == set()
    for path in FILES:
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert not calls & {"torch.load", "torch.save", "eval", "exec", "__import__"}, path


@pytest.mark.parametrize(
    ("package", "file"),
    [("datasets", "data/hub.py"), ("peft", "export/peft.py"), ("matplotlib", "report/drawing.py")],
)
def test_heavy_packages_have_one_door(package, file):
    assert importers(package) == {file}
