"""Start-up kits: their contents, what they allow, and that a kit from elsewhere is refused
everywhere.
"""

import json
import shutil
import socket
import ssl
import stat
import subprocess
import threading
import time
from contextlib import suppress

import pytest
from runs import fedspine, in_process

pytest.importorskip("nvflare", reason="a fleet of real machines needs the extra `flare`")

from fedspine.core.errors import BadInput
from fedspine.data.tasks import load_stated
from fedspine.flare import startup_kit as kits
from fedspine.flare.provision import AUTHORITY, Project, create, load_project, write_site_file
from fedspine.flare.site import load_site
from fedspine.flare.startup_kit import kit_at
from fedspine.runs.assemble import dataset
from fedspine.ui import fleet_demo
from fedspine.ui.fleet_demo import free_port


def project(**changes):
    return Project(
        **{"name": "clinic", "host": "127.0.0.1", "port": 8002, "sites": ("north", "south")}
        | changes
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits") / "clinic"
    create(project(), folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Kits of another project with the same names."""
    folder = tmp_path_factory.mktemp("foreign") / "clinic"
    create(project(), folder)
    return folder


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# --- the project file ---


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('name = "a"\nhost = "h"', "project.sites is missing"),
        ('name = "a"\nhost = "h"\nsites = []', "project.sites is ()"),
        (
            'name = "a"\nhost = "h"\nsites = "b"',
            "project.sites is 'b': Input should be a valid tuple",
        ),
        ('name = "a"\nhost = "h"\nsites = ["b c"]', "'b c' cannot be the name of a site"),
        ('name = "a"\nhost = "h"\nsites = ["server"]', "'server' cannot be the name of a site"),
        ('name = "a"\nhost = "h"\nsites = ["b", "B"]', "names 'b' twice"),
        ('name = "../a"\nhost = "h"\nsites = ["b"]', "'../a' cannot be the name"),
        ('name = "a"\nhost = "h:80"\nsites = ["b"]', "'h:80' is no host name or IPv4 address"),
        ('name = "a"\nhost = "h"\nport = 0\nsites = ["b"]', "project.port is 0"),
        (
            'name = "a"\nhost = "h"\noperator = "me"\nsites = ["b"]',
            "the form of an e-mail address was expected",
        ),
        (
            'name = "a"\nhots = "h"\nsites = ["b"]',
            "unknown key of a project 'hots'; did you mean 'host'?",
        ),
        ('name = "a"\nhost = "h"\nsites = ["b"]\nscheme = "udp"', "unknown project.scheme 'udp'"),
        ("name =", "cannot be read"),
    ],
)
def test_what_a_project_cannot_be(tmp_path, text, line):
    file = tmp_path / "project.toml"
    file.write_text(text)
    with pytest.raises(BadInput) as error:
        load_project(file)
    assert line in str(error.value) and "\n" not in str(error.value)


# --- the kits ---


def test_kits_are_made_for_all_and_their_keys_are_private(made):
    assert {path.name for path in made.iterdir()} == {
        "server",
        "north",
        "south",
        "admin",
        AUTHORITY,
        "project.toml",
    }
    for key in [*made.rglob("*.key"), *(made / AUTHORITY).rglob("cert.json")]:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key
    for name in ("server", "north", "admin", AUTHORITY):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o700
    found = [kit_at(made / name) for name in ("server", "north", "admin")]
    assert [(kit.role, kit.name, kit.project, kit.port) for kit in found] == [
        ("server", "server", "clinic", 8002),
        ("site", "north", "clinic", 8002),
        ("admin", "operator@fedspine.org", "clinic", 8002),
    ]
    assert 'name = "north"' in (made / "north" / "fedspine-site.toml").read_text()


def test_kits_demand_mutual_tls_and_allow_fedspines_application_only(made):
    for name, file in (
        ("server", "fed_server.json"),
        ("north", "fed_client.json"),
        ("admin", "fed_admin.json"),
    ):
        assert '"connection_security": "mtls"' in (made / name / "startup" / file).read_text()
    for name in ("server", "south"):
        resources = json.loads((made / name / "local" / "resources.json").read_text())
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert not [
            path for path in resources["class_allow_list"] if path.startswith("nvflare.app")
        ]
        assert "streamer" not in json.dumps(resources["components"])
        rights = json.loads((made / name / "local" / "authorization.json").read_text())[
            "permissions"
        ]
        assert list(rights) == ["project_admin"]
        assert (
            rights["project_admin"]["byoc"] == rights["project_admin"]["shell_commands"] == "none"
        )
    assert (
        json.loads((made / "south" / "local" / "resources.json").read_text())["allow_log_streaming"]
        is False
    )


def test_a_site_that_is_added_gets_its_kit_and_the_others_keep_theirs(tmp_path):
    create(project(), tmp_path / "kits")
    (tmp_path / "kits" / "north" / "fedspine-site.toml").write_text("mine")
    before = contents(tmp_path / "kits")
    again = create(project(sites=("north", "south", "west")), tmp_path / "kits")
    assert (again.made, again.kept) == (("west",), ("server", "north", "south", "admin"))
    after = contents(tmp_path / "kits")
    assert all(after[path] == data for path, data in before.items() if path.parts[0] in again.kept)
    root = [path for path in after if path.name == "rootCA.pem"]
    assert len(root) == 5 and len({after[path] for path in root}) == 1


def test_kits_are_not_mixed_with_anything_else(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    with pytest.raises(BadInput, match="holds something else"):
        create(project(), tmp_path / "full")
    create(project(), tmp_path / "kits")
    with pytest.raises(
        BadInput, match="made with host = '127.0.0.1', the project now says 'other'"
    ):
        create(project(host="other"), tmp_path / "kits")


def test_what_is_no_kit_is_said(made, tmp_path):
    for folder, role, line in (
        (tmp_path, None, "is no start-up kit"),
        (tmp_path / "absent", None, "is no start-up kit"),
        (made / "north", "server", "is the kit of a site, the kit of a server was expected"),
    ):
        with pytest.raises(BadInput, match=line):
            kit_at(folder, role)
    torn = shutil.copytree(made / "north", tmp_path / "torn")
    for text in ("{", "[]", '{"servers": []}', '{"servers": [{"name": "a"}]}'):
        (torn / "startup" / "fed_client.json").write_text(text)
        with pytest.raises(BadInput, match="is damaged"):
            kit_at(torn)


def test_a_site_whose_file_does_not_fit_is_not_started(made, tmp_path):
    kit = kit_at(shutil.copytree(made / "north", tmp_path / "north"))
    with pytest.raises(BadInput, match="rows.csv, which does not exist; set data.path"):
        kits.check_site(kit)
    write_site_file(kit.folder, name="south", data={"path": "pydoc-topics"})
    with pytest.raises(BadInput, match="is of site 'south', the kit is of 'north'"):
        kits.check_site(kit)
    write_site_file(kit.folder, name="north", data={"path": "pydoc-topics"})
    kits.check_site(kit)


# --- mutual TLS ---


@pytest.fixture
def listener(made, tmp_path):
    """A function that serves mutual TLS with a server's kit; returns the port."""
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        open_socket.listen()

        def serve(kit):
            context = ssl.create_default_context(
                ssl.Purpose.CLIENT_AUTH, cafile=str(kit / "startup" / "rootCA.pem")
            )
            context.load_cert_chain(kit / "startup" / "server.crt", kit / "startup" / "server.key")
            context.verify_mode = ssl.CERT_REQUIRED
            threading.Thread(target=answer, args=(context,), daemon=True).start()
            return open_socket.getsockname()[1]

        def answer(context):
            while True:
                try:
                    plain, _ = open_socket.accept()
                except OSError:
                    return
                with (
                    plain,
                    suppress(OSError),
                    context.wrap_socket(plain, server_side=True) as secure,
                ):
                    secure.recv(1)

        yield serve


def at_port(folder, port, to):
    """A copy of a site's kit with another port of its server."""
    shutil.copytree(folder, to)
    file = to / "startup" / "fed_client.json"
    file.write_text(file.read_text().replace("127.0.0.1:8002", f"127.0.0.1:{port}"))
    return kit_at(to, "site")


def test_a_kit_meets_its_own_server(made, listener, tmp_path):
    assert (
        kits.check_reach(at_port(made / "north", listener(made / "server"), tmp_path / "north"))
        is None
    )


def test_a_kit_refuses_a_server_of_others(made, foreign, listener, tmp_path):
    with pytest.raises(BadInput, match="does not belong to this kit"):
        kits.check_reach(at_port(made / "north", listener(foreign / "server"), tmp_path / "north"))


def test_a_server_refuses_a_kit_of_others_even_if_that_trusts_it(made, foreign, listener, tmp_path):
    untrusted = at_port(foreign / "north", listener(made / "server"), tmp_path / "north")
    shutil.copy(
        made / "server" / "startup" / "rootCA.pem", untrusted.folder / "startup" / "rootCA.pem"
    )
    with pytest.raises(BadInput, match="refuses this kit's certificate"):
        kits.check_reach(untrusted)


def test_a_server_that_is_not_there_is_waited_for(made, tmp_path):
    assert "does not answer" in kits.check_reach(
        at_port(made / "north", free_port(), tmp_path / "north")
    )


def test_the_same_kit_is_not_started_twice(made):
    kit = kit_at(made / "south")
    with kits.only_one(kit), pytest.raises(BadInput, match="already running"), kits.only_one(kit):
        pass
    with kits.only_one(kit):
        pass


# --- the command line ---


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs a command of `fedspine fleet` that is refused, in this process; returns
    its one line.
    """

    def run(*arguments):
        code, out, lines = in_process(monkeypatch, capsys, "fleet", *arguments)
        assert (code, out, len(lines)) == (2, "", 1), (out, lines)
        return lines[0]

    return run


def test_bad_input_is_one_line(made, tmp_path, refused):
    assert "project file" in refused("create", tmp_path / "absent.toml")
    assert "is no start-up kit" in refused("start", "north", "--kit", tmp_path)
    assert "is the kit of 'north'; 'south' was asked for" in refused(
        "start", "south", "--kit", made / "north"
    )
    assert "which does not exist; set data.path" in refused(
        "start", "north", "--kit", made / "north"
    )
    assert "is the kit of a site" in refused("status", "--kit", made / "north")


def test_a_site_sees_what_runs_have_left_on_its_disk(made, monkeypatch, capsys):
    place = made / "north"
    (place / "memory" / ("0" * 32)).mkdir(parents=True)
    (place / "memory" / ("0" * 32) / "000000001.safetensors").write_bytes(bytes(1_500_000))
    write_site_file(
        place, name="north", data={"path": "pydoc-topics"}, limits={"disk_bytes": 2_000_000}
    )
    asked = ("fleet", "status", "north", "--kit", place)
    _, out, _ = in_process(monkeypatch, capsys, *asked)
    line = "north: runs use 1.5 of 2.0 MB of disk space ("
    line += "memory 1.5, prefixes 0.0, tokens 0.0, privacy 0.0)"
    assert out.strip() == line
    _, out, _ = in_process(monkeypatch, capsys, *asked, "--json")
    assert json.loads(out)["used_bytes"] == 1_500_000
    shutil.rmtree(place / "memory")


def test_a_net_cannot_be_trained_at_sites(made, monkeypatch, capsys):
    words = ["--set", "task.model=cnn-h", "--set", "task.data=rows", "--fleet", made / "admin"]
    code, out, (line,) = in_process(monkeypatch, capsys, "run", *words, "--json")
    assert (code, out) == (2, "")
    assert "'cnn-h' is a net for arrays, but the sites of a fleet hold texts" in line


# --- the demo's data ---


def test_the_demo_gives_every_row_to_one_site_and_none_of_the_test_rows(tmp_path):
    recipe = fleet_demo.demo_recipe(3)
    data = dataset(recipe)
    shares = fleet_demo.share_out(data, ("a", "b", "c"))
    assert sorted(text for rows in shares.values() for text in rows.texts) == sorted(
        data.train.texts
    )
    assert not set(data.test.texts) & {text for rows in shares.values() for text in rows.texts}
    write = tmp_path / "a"
    write.mkdir()
    fleet_demo.give_rows(write, "a", shares["a"], data)
    read = load_stated(
        load_site(write).data.path, kind="classification", label_names=data.label_names
    )
    assert read.texts == shares["a"].texts and read.labels.tolist() == shares["a"].labels.tolist()


def test_the_demo_takes_no_folder_that_exists(tmp_path, refused):
    assert "exists; choose another folder with --out" in refused("demo", "--out", tmp_path)


# --- a real server ---


def wait_for(what, seconds=40):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, what
        time.sleep(0.3)
    return found


def fleet_status(federation):
    with kits.session(kit_at(federation.admin)) as session:
        return kits.fleet_status(session)


@pytest.mark.slow
def test_fleet_status_shows_who_is_connected(federation):
    done = fedspine("fleet", "status", "--kit", federation.admin, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [site["name"] for site in found["sites"]] == list(federation.sites)


@pytest.mark.slow
def test_a_kit_that_was_not_provisioned_is_let_in_nowhere(federation, tmp_path, refused):
    """Our command refuses it and says why; so does FLARE's own client without our check."""
    port = kit_at(federation.admin).port
    create(
        project(name="toys", port=port, sites=("untrusted", *federation.sites)), tmp_path / "kits"
    )
    for name in ("untrusted", federation.sites[0]):
        write_site_file(tmp_path / "kits" / name, name=name, data={"path": "pydoc-topics"})
        assert "does not belong to this kit" in refused(
            "start", name, "--kit", tmp_path / "kits" / name
        )
    assert "does not belong to this kit" in refused("status", "--kit", tmp_path / "kits" / "admin")
    untrusted = kit_at(tmp_path / "kits" / "untrusted")
    shutil.copy(
        federation.admin / "startup" / "rootCA.pem", untrusted.folder / "startup" / "rootCA.pem"
    )
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            untrusted.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        # the last line before it connects
        wait_for(lambda: b"ObjectStreamer.Abort" in (tmp_path / "log").read_bytes())
        time.sleep(5)  # within which each of the federation's own sites connects
        assert b"registered client" not in (tmp_path / "log").read_bytes()
        assert [site["name"] for site in fleet_status(federation)["sites"]] == list(
            federation.sites
        )
    finally:
        kits.end(process)


@pytest.mark.slow
def test_a_job_that_brings_code_is_not_run(federation, tmp_path):
    from nvflare.collab import CollabRecipe

    from fedspine.flare.app import Relay, SiteApp

    recipe = CollabRecipe("intruder", server=Relay(), client=SiteApp(), min_clients=1)
    recipe.export(str(tmp_path))
    assert list(tmp_path.rglob("custom/*.py"))
    with kits.session(kit_at(federation.admin)) as session:
        job = session.submit_job(str(tmp_path / "intruder"))
        ended = wait_for(
            lambda: (state := str(session.get_job_status(job))).startswith(kits.OVER) and state
        )
    assert ended == "FINISHED:FAILED_TO_RUN"
    log = federation.folder / "server" / "log.txt"
    wait_for(lambda: "BYOC not permitted" in log.read_text())


@pytest.mark.slow
def test_the_operator_reads_no_file_of_a_site(federation):
    with kits.session(kit_at(federation.admin)) as session:
        for command in (
            lambda: session.cat_target("north", file="startup/fed_client.json"),
            lambda: session.ls_target("north"),
        ):
            with pytest.raises(Exception, match="(?i)not authorized"):
                command()


@pytest.mark.slow
def test_a_site_that_dies_is_started_again(federation):
    import psutil

    def child():
        found = psutil.Process(federation.processes["west"].pid).children()
        return found[0] if found and found[0].status() != psutil.STATUS_ZOMBIE else None

    def log():
        return (
            (federation.folder / "west" / "console.log")
            .read_text()
            .count("Successfully registered client:west")
        )

    dead, times = child(), log()
    dead.kill()
    wait_for(lambda: log() > times)
    assert child().pid != dead.pid
    wait_for(
        lambda: (
            [site["name"] for site in fleet_status(federation)["sites"]] == list(federation.sites)
        )
    )
