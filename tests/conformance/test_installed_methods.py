"""Methods of other packages, by entry points: the example installed, and broken packages."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from places import ROOT
from runs import in_process, python, summary_of, tiny_job, write_csv
from site_files import terms, written

from fedspine import BadInput, FedLora, Recipe, methods
from fedspine.core.method import forget, registered
from fedspine.flare.run_terms import Refused
from fedspine.flare.site import load_site
from fedspine.flare.site_worker import works_of

EXAMPLE = ROOT / "examples" / "fedspine-fedprox-lora"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example package, built and installed by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")  # since a build leaves files in it
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", folder / "site"]
    subprocess.run([*command, folder / "source"], check=True)
    return folder / "site"


@pytest.fixture
def installed(monkeypatch):
    """A function that makes a folder importable; the methods that it brings go after the test."""
    before = registered().keys()

    def install(folder):
        monkeypatch.syspath_prepend(folder)
        methods._installed.cache_clear()

    yield install
    methods._installed.cache_clear()
    for name in registered().keys() - before:
        del sys.modules[registered()[name].__module__]
        forget([name])


def package(folder, name, code, **entries):
    """An installed package of one module called `name`, as pip leaves it."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{entry} = {where}" for entry, where in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[fedspine.methods]", *lines, ""]))


METHOD = """
from dataclasses import dataclass
from fedspine import method

@method("{name}")
@dataclass(frozen=True)
class Mine:
    rank: int = 8
"""


# --- the example ---


def test_the_example_is_listed_with_its_package(example, installed, monkeypatch, capsys) -> None:
    installed(example)
    code, out, lines = in_process(monkeypatch, capsys, "methods", "--json")
    assert (code, lines) == (0, [])
    found = json.loads(out)
    assert found["fedprox_lora"]["package"] == "fedspine-fedprox-lora 0.1.0"
    assert found["fedprox_lora"]["what"].startswith("FedProx on LoRA")
    assert found["fedprox_lora"]["settings"]["mu"] == 0.1
    assert found["fedlora"]["package"].startswith("fedspine ")


def test_the_example_runs_from_a_recipe(
    example, installed, monkeypatch, capsys, tiny_folder, tmp_path
) -> None:
    installed(example)
    job = tiny_job(tiny_folder("bert"), write_csv(tmp_path / "rows.csv"))
    at = next(i for i, word in enumerate(job) if word.startswith("method.ranks"))
    job[at] = "method.name=fedprox_lora"
    run = ("run", *job, "--set", "method.rank=4", "--out", tmp_path / "run", "--json")
    code, _, lines = in_process(monkeypatch, capsys, *run)
    assert (code, lines) == (0, [])
    summary = summary_of(tmp_path / "run")
    assert (summary["method"], summary["rounds"]) == ("fedprox_lora", 2)
    export = ("export", tmp_path / "run", "--to", tmp_path / "m", "--no-parity")
    code, _, _ = in_process(monkeypatch, capsys, *export)
    assert code == 0


def distance(state, other):
    """Between the weights of two states."""
    gaps = [state.adapter[n] - other.adapter[n] for n in state.adapter]
    gaps += [state.head[n] - other.head[n] for n in state.head]
    return float(torch.stack([gap.square().sum() for gap in gaps]).sum().sqrt())


def test_without_its_term_it_is_fedlora_and_with_it_stays_nearer(example, installed, lab) -> None:
    installed(example)
    prox = methods.find("fedprox_lora").toy()
    fedlora = FedLora.toy()
    plain = lab("fedlora").run(fedlora, rounds=2)
    same = lab("same").run(replace(prox, mu=0.0), rounds=2)
    assert distance(plain, same) == 0
    first = lab("first")
    start = first.run(prox, rounds=0)
    moved = [
        distance(lab(str(mu)).run(replace(prox, mu=mu), rounds=1), start)
        for mu in (0.0, 1.0, 100.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_a_site_takes_it_only_where_its_file_names_it(example, installed, tmp_path) -> None:
    stated = terms(method="fedprox_lora")
    silent = load_site(written(tmp_path / "silent", more="[models]\ntiny = 'tiny'"))
    allows = "[models]\ntiny = 'tiny'\n[allow]\nmethods = ['fedprox_lora']"
    named = load_site(written(tmp_path / "named", more=allows))
    with pytest.raises(Refused, match="does not come with fedspine; install the package") as error:
        silent.check(stated)
    assert error.value.reason == "method"
    silent.check(terms(method="fedlora"))
    named.check(stated)
    works_of.cache_clear()
    with pytest.raises(BadInput, match="unknown method 'fedprox_lora'"):  # not installed yet
        works_of("fedprox_lora")
    installed(example)
    assert works_of("fedprox_lora") == {"fedprox_lora:tune_near"}
    works_of.cache_clear()


# --- bad ones ---


def test_what_is_wrong_with_a_package_is_one_line_and_others_work(
    installed, tmp_path, monkeypatch, capsys
) -> None:
    package(tmp_path, "gone", "import no_such_module\n", lost="gone:Mine")
    package(tmp_path, "taken", METHOD.format(name="fedlora"), fedlora="taken:Mine")
    late = METHOD.format(name="late") + "raise RuntimeError('two\\nlines')\n"
    package(tmp_path, "later", late, late="later:Mine")
    package(tmp_path, "other", METHOD.format(name="one_name"), another="other:Mine")
    plain = METHOD.format(name="plain").replace("@dataclass(frozen=True)\n", "")
    package(tmp_path, "plain", plain, plain="plain:Mine")
    bare = METHOD.format(name="bare").replace("rank: int = 8", "rank: int")
    package(tmp_path, "bare", bare, bare="bare:Mine")
    package(tmp_path, "sound", METHOD.format(name="sound"), sound="sound:Mine")
    before = set(methods.all_methods())
    installed(tmp_path)
    assert set(methods.all_methods()) == before | {"sound"}
    assert methods.packages()["sound"] == "sound 1.0"
    assert methods.find("fedlora") is FedLora
    broken = {one.name: one.line for one in methods.broken()}
    assert broken == {
        "lost": "method 'lost' of gone 1.0 cannot be used: ModuleNotFoundError: No module named "
        "'no_such_module'",
        "fedlora": "method 'fedlora' of taken 1.0 cannot be used: TypeError: the name 'fedlora' is "
        "taken by fedspine.methods.fedlora.FedLora; choose another",
        "late": "method 'late' of later 1.0 cannot be used: RuntimeError: two lines",
        "another": "method 'another' of other 1.0 cannot be used: TypeError: other:Mine is not the "
        "class registered as 'another'; decorate it with @method('another')",
        "plain": "method 'plain' of plain 1.0 cannot be used: TypeError: Mine is not a frozen "
        "dataclass; write @dataclass(frozen=True) between @method and the class",
        "bare": "method 'bare' of bare 1.0 cannot be used: TypeError: the setting rank of Mine has "
        "no default value; write rank: ... = VALUE, such as a tuple in place of a list",
    }
    with pytest.raises(BadInput, match="Mine does not define check, start, round, deploy"):
        Recipe(method="sound")
    with pytest.raises(BadInput, match="'lost' of gone 1.0 cannot be used.* or remove it"):
        methods.find("lost")
    with pytest.raises(BadInput, match="unknown method 'soun'; did you mean 'sound'"):
        methods.find("soun")
    code, out, lines = in_process(monkeypatch, capsys, "methods", "--json")
    assert code == 0
    assert sorted(lines) == sorted(f"fedspine: {line}" for line in broken.values())
    assert json.loads(out)["sound"]["package"] == "sound 1.0"
    code, out, lines = in_process(monkeypatch, capsys, "methods", "sound", "--json")
    assert (code, lines, list(json.loads(out))) == (0, [], ["sound"])


# --- a method in a script, and the guide ---


def test_a_method_of_a_script_runs_in_workers_too(tiny_folder, tmp_path) -> None:
    job = {"data": str(write_csv(tmp_path / "rows.csv")), "model": str(tiny_folder("bert"))}
    job |= {"devices": 2, "per_round": 2, "rounds": 1, "precision": "fp32", "references": False}
    (tmp_path / "script.py").write_text(
        (EXAMPLE / "fedprox_lora.py").read_text()
        + "from fedspine import Recipe, run\n"
        + "for workers in (1, 2):\n    method = FedProxLora(rank=4, steps=2)\n"
        + f"    recipe = Recipe(method=method, workers=workers, **{job})\n"
        + "    print(run(recipe).summary['state_sha256'])\n"
    )
    done = python(tmp_path / "script.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    one, two = done.stdout.split()
    assert one == two


def test_the_guide_shows_the_example_as_it_is() -> None:
    guide = (EXAMPLE.parents[1] / "docs" / "python.md").read_text()
    _, walk = guide.split("\n## Write a method in one file\n")
    walk, _ = walk.split("\n## ", 1)
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", walk, re.DOTALL)
    whole = "".join(path.read_text() for path in sorted(EXAMPLE.iterdir()))
    assert len(blocks) == 5
    for block in blocks:
        assert block in whole
