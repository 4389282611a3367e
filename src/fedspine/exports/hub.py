"""Push an exported folder to a repository of the Hugging Face Hub.

Only this file writes there, through `huggingface_hub`.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fedspine.core.errors import BadInput, reason_of
from fedspine.exports.card import ADAPTER, BASE

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Client(Protocol):
    """The part of `huggingface_hub.HfApi` that is used."""

    def whoami(self) -> Any: ...

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any: ...


def client_for(repo: str, make: Any = HfApi) -> Client:
    """A client for pushing to `repo`, checked before anything is computed.

    Raises BadInput for an invalid repository name, and if nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = reason_of(error)
        raise BadInput(
            f"--push-to-hub {repo!r} is not a repository name ({reason}); write NAME or USER/NAME"
        ) from None
    client: Client = make()
    try:
        client.whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise BadInput(f"nobody is logged in to the Hub ({reason_of(error)}); {LOGIN}") from None
    return client


def push(folder: Path, repo: str, client: Client, *, private: bool = False) -> str:
    """Upload all files of an exported folder to `repo`, which is created if it does not exist;
    returns its full name.

    Raises BadInput for an adapter whose base is on this machine, and if the Hub refuses; the folder
    stays as it is.
    """
    _check_adapter(folder)
    try:
        made = client.create_repo(repo, private=private, exist_ok=True)
        whole = str(getattr(made, "repo_id", repo))
        client.upload_folder(
            repo_id=whole, folder_path=folder, commit_message=f"Export of fedspine: {folder.name}"
        )
    except Exception as error:  # the client raises many types
        raise BadInput(
            f"{folder} is written, but pushing it to {repo} failed ({reason_of(error)}); push it "
            f"with: hf upload {repo} {folder}"
        ) from None
    return whole


def _check_adapter(folder: Path) -> None:
    """An adapter whose base is on this machine alone is useless elsewhere."""
    if not (folder / ADAPTER).is_file():
        return
    base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    here = base.startswith(".") or Path(base).is_absolute() or Path(base).exists()
    if here and not (folder / BASE).is_dir():
        raise BadInput(
            f"{folder} is written but not pushed: its adapter fits {base}, a path on this machine; "
            "push it --with-base, or --format hf, or an adapter for a base on the Hub"
        )
