"""Imports between the packages go one way; this reads them, so that nobody has to remember.

All imports count: those inside functions and those only for type checkers too.
"""

import ast
import sys
from pathlib import Path

import pytest

import fedspine
from fedspine.methods import all_methods

SOURCE = Path(fedspine.__file__).parent

# what each package imports from fedspine, no more and no less; a package is a folder, or a file
# beside them
ARROWS = {
    "core": set(),
    "control": {"core"},
    "data": {"core"},
    "report": {"core"},
    "storage": {"core"},
    "lm": {"control", "core", "data"},
    "nets": {"core", "lm"},
    "pruning": {"control", "core", "lm"},
    "split": {"control", "core", "lm", "nets"},
    "methods": {"control", "core", "lm", "pruning", "split"},
    "execution": {"core", "data", "lm", "nets"},
    "fleets": {"core", "execution", "storage"},
    "flare": {"core", "data", "fleets", "lm", "methods", "storage"},
    "recipes": set(),
    "runs": {
        *("core", "data", "execution", "flare", "fleets", "lm", "methods", "nets", "report"),
        "storage",
    },
    "exports": {"core", "data", "flare", "fleets", "lm", "nets", "runs", "storage"},
    "ui": {
        *("core", "data", "execution", "exports", "flare", "fleets", "lm", "methods", "report"),
        *("runs", "storage"),
    },
    "__init__": {"core", "exports", "fleets", "methods", "runs", "ui"},
    "__main__": {"ui"},
}


def package_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path):
    parts = ("fedspine", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def imports(path):
    """The dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


FILES = sorted(SOURCE.rglob("*.py"))
IMPORTS = {path: imports(path) for path in FILES}


def importers(package):
    """The files that import a package, or something in it."""
    return {
        str(path.relative_to(SOURCE))
        for path, names in IMPORTS.items()
        if any(name == package or name.startswith(package + ".") for name in names)
    }


def circle(arrows):
    """What lies on a circle of these arrows, or leads into one; nothing where there is none."""
    left = dict(arrows)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_package_has_its_place():
    assert {package_of(path) for path in FILES} == set(ARROWS)


def test_the_arrows_have_no_circle():
    assert circle(ARROWS) == []
    assert circle({"a": {"b"}, "b": {"a"}, "c": set()}) == ["a", "b"]


def test_the_files_have_no_circle():
    modules = {module_of(path): path for path in FILES}
    assert (
        circle(
            {m: (IMPORTS[path] & modules.keys()) - {m, "fedspine"} for m, path in modules.items()}
        )
        == []
    )


@pytest.mark.parametrize("package", ARROWS)
def test_imports_are_the_arrows(package):
    used = {
        name.split(".")[1]
        for path in FILES
        if package_of(path) == package
        for name in IMPORTS[path]
        if name.startswith("fedspine.")
    }
    assert used - {package, "__version__"} == ARROWS[package]


def test_a_file_in_methods_is_a_registered_method():
    files = {module_of(path) for path in FILES if package_of(path) == "methods"}
    homes = [cls.__module__ for cls in all_methods().values()]
    # other tests register methods of their own
    ours = [home for home in homes if home.startswith("fedspine.")]
    assert sorted(ours) == sorted(files - {"fedspine.methods"})


def test_a_type_has_a_name_of_its_own():
    """One word, one type: classes and aliases of types, wherever they are."""
    homes = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                    pass
                case ast.AnnAssign(target=ast.Name(id=name)):
                    pass
                case _:
                    continue
            if name[0].isupper() and not name.isupper():
                homes.setdefault(name, []).append(str(path.relative_to(SOURCE)))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_control_is_numpy_only():
    for path in (SOURCE / "control").rglob("*.py"):
        used = {name.split(".")[0] for name in IMPORTS[path]} - set(sys.stdlib_module_names)
        assert used <= {"fedspine", "jaxtyping", "numpy"}, path


def test_nothing_is_unpickled():
    # Only direct uses: pipes to our own forked workers pickle inside multiprocessing.
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
    [
        *(("datasets", "data/hub.py"), ("matplotlib", "report/drawing.py")),
        *(("peft", "exports/peft.py"), ("executorch", "exports/executorch_program.py")),
    ],
)
def test_heavy_packages_have_one_door(package, file):
    assert importers(package) == {file}


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_graphs_have_three_doors(package):
    names = ("onnx_graph", "onnx_numbers", "onnx_wide")
    assert importers(package) == {f"exports/{name}.py" for name in names}


def test_gguf_has_a_door_to_read_and_one_to_write():
    assert importers("gguf") == {"lm/gguf_files.py", "exports/gguf_file.py"}
