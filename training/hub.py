"""A trained drafter on the Hugging Face hub, where the user asks for it; nothing else here uses the network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from specdec.errors import SpecDecError


class HubError(SpecDecError):
    """The hub refused a name or an upload, or could not be reached."""


def push(folder: Path, repository: str, api: HfApi | None = None) -> str:
    """Upload all files of the folder to a model repository, which is private if it is made here; returns the commit's address.

    repository: name/repository.  api: with a token; by default the one that `hf auth login` left. Raises HubError, and the
    folder stays as it is.
    """
    api = api or HfApi()
    try:
        if not api.repo_exists(repository):
            api.create_repo(repository, private=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Drafter trained with specdec")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise HubError(
            f"{folder} was not uploaded to {repository!r}: {error}; it is complete on disk. Log in with `hf auth login`, check "
            "the name, and upload it by `hf upload`"
        ) from error
    return str(done.commit_url)
