"""Pushing an export to the Hub, with a fake of huggingface_hub's client."""

import inspect
import json

import pytest
from huggingface_hub import HfApi
from runs import in_process

from fedspine.core.errors import BadInput
from fedspine.exports import hub
from fedspine.lm.load import MINILM_HUB
from fedspine.ui import python


class Hub:
    """Repositories in memory; `refuses` names the call that fails."""

    def __init__(self, refuses=None):
        self.refuses, self.repos = refuses, {}

    def _answer(self, call):
        if call == self.refuses:
            raise ConnectionError(f"no {call}\nand no more")

    def whoami(self):
        self._answer("whoami")
        return {"name": "ann"}

    def create_repo(self, repo_id, *, private, exist_ok):
        self._answer("create_repo")
        assert exist_ok
        whole = repo_id if "/" in repo_id else f"ann/{repo_id}"
        self.repos[whole] = {"private": private}
        return type("RepoUrl", (str,), {"repo_id": whole})(f"https://hub/{whole}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self._answer("upload_folder")
        files = {file.name: file.read_bytes() for file in folder_path.iterdir() if file.is_file()}
        self.repos[repo_id] |= {"files": files, "message": commit_message}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("a card")
    return tmp_path / "model"


def test_all_files_arrive(folder):
    client = hub.client_for("small", make=Hub)
    assert hub.push(folder, "small", client, private=True) == "ann/small"
    found = client.repos["ann/small"]
    assert found["files"] == {"README.md": b"a card"} and found["private"]
    assert "model" in found["message"]


def test_the_stand_in_is_called_as_the_client_is():
    for name in ("whoami", "create_repo", "upload_folder"):
        real = inspect.signature(getattr(HfApi, name)).parameters
        assert set(inspect.signature(getattr(Hub, name)).parameters) <= set(real)


@pytest.mark.parametrize("name", ["a b", "a/b/c", "/x", "--x", ""])
def test_a_name_that_is_none_is_refused_before_anything(name):
    with pytest.raises(BadInput, match="is not a repository name"):
        hub.client_for(name, make=None)


def test_without_a_login_nothing_is_exported(tmp_path, monkeypatch, capsys):
    client = hub.client_for
    monkeypatch.setattr(hub, "client_for", lambda repo: client(repo, lambda: Hub("whoami")))
    words = ("export", tmp_path, "--to", tmp_path / "x", "--push-to-hub", "ann/small")
    code, out, lines = in_process(monkeypatch, capsys, *words)
    assert (code, out, len(lines)) == (2, "", 1) and "hf auth login" in lines[0]
    assert not (tmp_path / "x").exists()


def test_private_needs_a_repository(tmp_path, monkeypatch, capsys):
    words = ("export", tmp_path, "--to", tmp_path / "x", "--private")
    code, _, lines = in_process(monkeypatch, capsys, *words)
    assert code == 2 and "--push-to-hub" in lines[0]


@pytest.mark.parametrize("refuses", ["create_repo", "upload_folder"])
def test_where_the_hub_refuses_the_folder_stays(folder, refuses):
    client = Hub(refuses)
    with pytest.raises(BadInput, match=f"no {refuses} and no more.*hf upload ann/x"):
        hub.push(folder, "ann/x", client)
    assert (folder / "README.md").is_file()


def test_a_path_of_this_machine_is_not_pushed(folder):
    client, settings = Hub(), folder / "adapter_config.json"
    for base in (str(folder), "./bert"):
        settings.write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(BadInput, match="a path on this machine; push it --with-base"):
            hub.push(folder, "ann/x", client)
    assert not client.repos
    settings.write_text(json.dumps({"base_model_name_or_path": MINILM_HUB}))
    assert hub.push(folder, "ann/x", client) == "ann/x"
    settings.write_text(json.dumps({"base_model_name_or_path": "./base"}))
    (folder / "base").mkdir()
    assert hub.push(folder, "ann/y", client) == "ann/y"


def test_export_pushes_what_it_wrote(tmp_path, monkeypatch):
    client = Hub()

    def export_model(folder, *, to, **_):
        to.mkdir()
        (to / "config.json").write_text("{}")
        return {"folder": str(to)}

    monkeypatch.setattr(python, "export_model", export_model)
    monkeypatch.setattr(hub, "client_for", lambda repo: client)
    found = python.export(tmp_path, tmp_path / "x", push_to_hub="small")
    assert found["pushed_to"] == "ann/small"
    assert client.repos["ann/small"]["files"] == {"config.json": b"{}"}
