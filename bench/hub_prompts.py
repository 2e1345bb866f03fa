"""Prompts from a dataset on the Hugging Face hub, pinned to a commit; the network is used only for a name that the user typed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from specdec.errors import SpecDecError

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[^@:/]+))?(:(?P<split>[\w-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HOW = "write OWNER/NAME@REVISION, OWNER/NAME/CONFIG@REVISION:SPLIT, or a .jsonl or .tsv file that is there"


@dataclass(frozen=True, slots=True)
class HubSet:
    """A dataset at a commit. config: None for its only one."""

    repo: str
    config: str | None
    revision: str
    split: str

    @property
    def said(self) -> str:
        """As it may be typed again."""
        config = f"/{self.config}" if self.config else ""
        return f"{self.repo}{config}@{self.revision}:{self.split}"


def hub_set(text: str) -> HubSet:
    """OWNER/NAME[/CONFIG]@REVISION[:SPLIT], of the split "test" where none is named.

    Raises SpecDecError for any other text, and for a revision that is no commit: a branch moves, and prompts with it.
    """
    found = _NAME.fullmatch(text)
    if found is None:
        raise SpecDecError(f"--prompts {text} is no file here and no name of a dataset; {_HOW}")
    revision = found["revision"]
    if revision is None or not _COMMIT.fullmatch(revision):
        got = f"the revision {revision!r}" if revision else "no revision"
        raise SpecDecError(f"--prompts {text} is no file here, and as a dataset has {got}; a commit's 40 digits are needed: {_HOW}")
    return HubSet(found["repo"], found["config"], revision, found["split"] or "test")


def hub_rows(wanted: HubSet) -> tuple[list[dict[str, Any]], str]:
    """The rows of a dataset and its licence as its card states it, empty where it does not. Raises SpecDecError."""
    # Imported here: it is slow to import, and only this needs it.
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        rows = load_dataset(wanted.repo, wanted.config, split=wanted.split, revision=wanted.revision)
        card = HfApi().dataset_info(wanted.repo, revision=wanted.revision).card_data
    except (OSError, ValueError) as error:
        raise SpecDecError(f"--prompts {wanted.said} cannot be loaded from the hub: {error}") from error
    licence = ("" if card is None else card.get("license")) or ""
    return [dict(row) for row in rows], licence if isinstance(licence, str) else " and ".join(licence)
