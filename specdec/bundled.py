"""Where the models that ship with the package lie on disk."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from specdec.errors import SpecDecError

Role = Literal["target", "draft", "medusa", "pard"]
_FOLDERS = {"target": "reference-target", "draft": "reference-draft", "medusa": "reference-medusa", "pard": "reference-pard"}


BUNDLED = "bundled"


def bundled_path(name: Role) -> Path:
    """The folder of a bundled checkpoint: the target, and the draft model, Medusa heads and PARD model made for it.

    Raises SpecDecError for another name, or when the installation holds no weights.
    """
    if name not in _FOLDERS:
        raise SpecDecError(f"no bundled model is called {name!r}; choose one of {', '.join(_FOLDERS)}")
    path = Path(str(files("specdec"))) / "models" / _FOLDERS[name]
    if not (path / "model.safetensors").is_file():
        raise SpecDecError(f"the bundled {name} model is missing from this installation; reinstall specdec-toolkit")
    return path


def checkpoint(name: str, role: Role) -> str:
    """A checkpoint's folder or hub name; "bundled" is the model of that role which ships with specdec."""
    return str(bundled_path(role)) if name == BUNDLED else name
