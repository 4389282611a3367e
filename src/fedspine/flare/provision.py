"""Makes start-up kits from a project file: certificates and settings for the server, every site and
the operator.

NVIDIA FLARE's provisioner makes keys and certificates; all traffic is mutual TLS. A kit allows less
than FLARE's default: a job carries no code and can only consist of fedspine's application, the
operator gets no shell on a site, and a site's logs stay there. A second call, after a site was
added, makes only that site's kit.
"""

import importlib.resources
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import tomli_w

from fedspine.core.errors import BadInput
from fedspine.core.strict import Section, known_keys, read_toml, validated
from fedspine.flare.site import SITE_FILE, check_name
from fedspine.flare.startup_kit import ADMIN_KIT, needs_flare

# folder with the private key that signs certificates; it stays with the person who provisions
AUTHORITY = "authority"
PROJECT_FILE = "project.toml"  # in the folder of kits: what they were made from
ORGANISATION = "fedspine"
APPLICATION = [  # the only components of a job
    "fedspine.flare.app",
    "nvflare.collab.runtime.controller.CollabController",
    "nvflare.collab.runtime.executor.CollabExecutor",
]
OPERATOR = {  # rights of the operator at the sites and the server
    "submit_job": "any", "clone_job": "any", "manage_job": "any", "download_job": "any",
    "view": "any", "operate": "any",
    "shell_commands": "none", "byoc": "none", "server-predeployed-flwr": "none",
}  # fmt: skip


class Project(Section):
    """The participants and the server's address."""

    name: str
    host: str  # of the server, as sites and operator reach it: a name or an IPv4 address
    # the only one that has to be open, on the server
    port: int = pydantic.Field(8002, ge=1, le=65535)
    sites: tuple[str, ...] = pydantic.Field(min_length=1)
    also: tuple[str, ...] = ()  # further names and addresses for the server's certificate
    # in the form of an e-mail address; nothing is sent to it
    operator: str = "operator@fedspine.org"
    scheme: Literal["grpc", "tcp", "http"] = "tcp"  # of the connections, all of them mutual TLS


@dataclass(frozen=True)
class Kits:
    """The start-up kits in `folder`, by name: those `made` now, and those `kept` as they were."""

    folder: Path
    made: tuple[str, ...]
    kept: tuple[str, ...]


def load_project(path: Path) -> Project:
    """The project that a file describes; raises BadInput for an invalid one."""
    table = read_toml(
        path,
        "project file",
        'write one with name, host and sites = ["a", "b"]; see docs/real-devices.md',
    )
    try:
        known_keys("key of a project", table, Project.model_fields)
        lists = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        project = validated("project", Project, lists)
        _check(project)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return project


def create(project: Project, folder: Path) -> Kits:
    """Make the kits that `folder` does not hold yet: `folder/server`, one for each site, and
    `folder/admin`.

    Raises BadInput for a folder with other content or with kits of other settings, and if NVIDIA
    FLARE is not installed.
    """
    needs_flare()
    _check(project)
    names = ["server", *project.sites, ADMIN_KIT]
    _check_folder(project, folder)
    kept = tuple(name for name in names if (folder / name).exists())
    made = tuple(name for name in names if name not in kept)
    if made:
        provisioned = _provisioned(project, folder / AUTHORITY)
        for name in made:
            source = provisioned / (project.operator if name == ADMIN_KIT else name)
            _narrow(source, name)
            source.chmod(0o700)
            source.rename(folder / name)
        shutil.rmtree(provisioned)
    (folder / PROJECT_FILE).write_text(tomli_w.dumps(project.model_dump()), encoding="utf-8")
    return Kits(folder, made, kept)


def write_site_file(folder: Path, **values: Any) -> None:
    """Write a `fedspine-site.toml` with these keys, for a site that a program sets up."""
    (folder / SITE_FILE).write_text(tomli_w.dumps(values), encoding="utf-8")


# --- checks ---


def _check(project: Project) -> None:
    needs_flare()
    from nvflare.apis.utils.format_check import name_check

    check_name(project.name)
    for site in project.sites:
        check_name(site)
    lower = [site.lower() for site in project.sites]  # some file systems do not tell cases apart
    if twice := next((site for site in lower if lower.count(site) > 1), None):
        raise BadInput(f"project.sites names {twice!r} twice; give every site a name of its own")
    for host in (project.host, *project.also):
        if name_check(host, "host_name")[0]:
            raise BadInput(
                f"{host!r} is no host name or IPv4 address; "
                "give one by which sites reach the server"
            )
    if name_check(project.operator, "admin")[0]:
        raise BadInput(
            f"project.operator is {project.operator!r}: the form of an e-mail address was expected"
        )


def _check_folder(project: Project, folder: Path) -> None:
    """Raise BadInput for a folder with other content, and for settings that differ from those of
    the existing kits.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
    elif not folder.is_dir() or (any(folder.iterdir()) and not (folder / PROJECT_FILE).exists()):
        raise BadInput(f"{folder} holds something else; choose another folder with --out")
    if not (folder / PROJECT_FILE).exists():
        return
    before = load_project(folder / PROJECT_FILE)
    for key in ("name", "host", "port", "also", "operator", "scheme"):
        if getattr(before, key) != getattr(project, key):
            raise BadInput(
                f"the kits in {folder} were made with {key} = {getattr(before, key)!r}, "
                f"the project now says {getattr(project, key)!r}; undo that, or make "
                "new kits for all with --out"
            )


# --- NVIDIA FLARE's provisioner, and restrictions of its defaults ---


def _provisioned(project: Project, authority: Path) -> Path:
    """FLARE's own kits of all participants; certificates of earlier calls are reused."""
    from nvflare.lighter.constants import CtxKey
    from nvflare.lighter.entity import Participant
    from nvflare.lighter.entity import Project as FlareProject
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    authority.mkdir(exist_ok=True)
    authority.chmod(0o700)
    hosts = list(dict.fromkeys((project.host, *project.also)))
    server = {"default_host": project.host, "host_names": hosts, "fed_learn_port": project.port}
    participants = [
        Participant("server", "server", ORGANISATION, server),
        *(Participant("client", site, ORGANISATION) for site in project.sites),
        Participant("admin", project.operator, ORGANISATION, {"role": "project_admin"}),
    ]
    builders = [
        WorkspaceBuilder(),
        StaticFileBuilder(config_folder="config", scheme=project.scheme),
        CertBuilder(),
    ]
    made = FlareProject(project.name, "", participants, {"api_version": 4})
    context = Provisioner(str(authority), builders).provision(
        made, logger=logging.getLogger(__name__)
    )
    if context.get(CtxKey.BUILD_ERROR):
        raise BadInput(f"NVIDIA FLARE could not make the kits: {context.get(CtxKey.ERRORS)}")
    (authority / project.name / "state" / "cert.json").chmod(0o600)
    return Path(context[CtxKey.CURRENT_PROD_DIR])


def _narrow(kit: Path, name: str) -> None:
    """Restrict a new kit's rights, and add the file that a site's owner edits."""
    if name == ADMIN_KIT:
        return
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    resources["class_allow_list"] = APPLICATION
    resources["components"] = [
        part for part in resources["components"] if part["id"] != "site_log_streamer"
    ]
    resources["allow_log_streaming"] = False
    (local / "resources.json").write_text(json.dumps(resources, indent=1), encoding="utf-8")
    rights = {"format_version": "1.0", "permissions": {"project_admin": OPERATOR}}
    (local / "authorization.json").write_text(json.dumps(rights, indent=1), encoding="utf-8")
    if name != "server":
        text = (
            importlib.resources.files("fedspine.recipes")
            .joinpath(SITE_FILE)
            .read_text(encoding="utf-8")
        )
        (kit / SITE_FILE).write_text(text.replace('"SITE"', json.dumps(name)), encoding="utf-8")
