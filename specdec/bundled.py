"""Where the model pair that ships with the package lies on disk."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from specdec.errors import SpecDecError

_FOLDERS = {"target": "reference-target", "draft": "reference-draft"}


def bundled_path(name: Literal["target", "draft"]) -> Path:
    """The folder of a bundled checkpoint, for `AutoModelForCausalLM.from_pretrained`.

    Raises SpecDecError for another name, or when the installation holds no weights.
    """
    if name not in _FOLDERS:
        raise SpecDecError(f"no bundled model is called {name!r}; choose 'target' or 'draft'")
    path = Path(str(files("specdec"))) / "models" / _FOLDERS[name]
    if not (path / "model.safetensors").is_file():
        raise SpecDecError(f"the bundled {name} model is missing from this installation; reinstall specdec-toolkit")
    return path
