"""Uploading an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from spin_lightning.errors import SettingError, SpinError, first_line
from spin_lightning.policies.adapter_check import ADAPTER_CONFIG
from spin_lightning.redaction import masked

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ADVICE: Final = {
    401: "log in with: hf auth login, or set HF_TOKEN to a token that may write",
    403: "use a token that may write to this repository, or name one of your own",
    404: "name a repository of an account or organization that exists",
}


def check_push(repository: str, *, base_is_local: bool) -> None:
    """Refuse, before anything is written, what could not be uploaded or used by others.

    Args:
        repository: The repository, `owner/name`.
        base_is_local: Whether the folder will be an adapter whose base is a folder here.

    Raises:
        SettingError: The name is not one of a repository, no token is known, or others could not
            load the base.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise SettingError(
            "push", repository, "it is not the name of a repository", fix="give owner/name"
        )
    if base_is_local:
        raise SettingError(
            "push",
            repository,
            "the adapter's base model is a folder on this machine, which others cannot load",
            fix="push a full model with --merge true, or start the run from a hub id",
        )
    if get_token() is None:
        raise SettingError("push", repository, "no token of the hub is known", fix=_ADVICE[401])


def push_folder(folder: Path, repository: str, *, private: bool, kind: str) -> str:
    """Upload a folder as one commit.

    Args:
        folder: A verified folder.
        repository: The repository, `owner/name`; it is created if there is none.
        private: Whether to create it as private; one that is there stays as it is.
        kind: `model` or `dataset`.

    Returns:
        The address of the commit.

    Raises:
        SpinError: The hub refuses it, or cannot be reached. The message holds no token.
    """
    token = get_token()
    what = "adapter" if (folder / ADAPTER_CONFIG).exists() else kind
    disable_progress_bars()
    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True, repo_type=kind)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type=kind,
            commit_message=f"Add {what} by spin-lightning",
        )
    # The hub's client, and the HTTP library below it, raise errors of many classes.
    except Exception as error:
        advice = _ADVICE.get(_status(error), "check the connection to the hub")
        reason = "" if error.__cause__ is None else f": {first_line(error.__cause__)}"
        problem = masked(first_line(error) + reason, [token])
        # Not `from error`: its text, and that of the request, may hold the token.
        raise SpinError(
            f"push={repository!r}: the hub did not take the folder ({problem}). {folder} is "
            "complete and verified",
            fix=f"{advice}; then run: hf upload {repository} {folder} --repo-type {kind}",
        ) from None
    finally:
        enable_progress_bars()
    return masked(str(commit.commit_url), [token])


def _status(error: BaseException) -> int:
    """The status with which the hub answered; 0 if it did not."""
    causes = (error, error.__cause__)
    found = (getattr(getattr(each, "response", None), "status_code", None) for each in causes)
    return next((int(status) for status in found if status is not None), 0)
