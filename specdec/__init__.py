"""specdec: lossless speculative decoding for Hugging Face causal language models.

Importing this package imports neither torch nor transformers; a public name is loaded when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.bundled import bundled_path
    from specdec.drafters.best_first import BestFirstDrafter
    from specdec.drafters.sampled_tree import SampledTreeDrafter
    from specdec.drafters.staged import Staged
    from specdec.drafters.vocab_map import VocabMap
    from specdec.errors import SpecDecError
    from specdec.generator import SpeculativeGenerator
    from specdec.goodput import GoodputPlanner
    from specdec.planner import FixedPlanner
    from specdec.runner import RunnerOptions
    from specdec.tetris import TetrisPlanner

__version__ = "0.1.0"

__all__ = [
    "BestFirstDrafter",
    "FixedPlanner",
    "GoodputPlanner",
    "RunnerOptions",
    "SampledTreeDrafter",
    "SpecDecError",
    "SpeculativeGenerator",
    "Staged",
    "TetrisPlanner",
    "VocabMap",
    "__version__",
    "bundled_path",
]

# In a source checkout the sub-packages stand beside this folder (pyproject.toml maps them);
# in a wheel they are inside it and there is nothing to add.
_here = Path(__file__).parent
if not (_here / "drafters").is_dir():
    __path__.append(str(_here.parent))

_DEFINED_IN = {
    "BestFirstDrafter": "specdec.drafters.best_first",
    "FixedPlanner": "specdec.planner",
    "GoodputPlanner": "specdec.goodput",
    "RunnerOptions": "specdec.runner",
    "SampledTreeDrafter": "specdec.drafters.sampled_tree",
    "SpecDecError": "specdec.errors",
    "SpeculativeGenerator": "specdec.generator",
    "Staged": "specdec.drafters.staged",
    "TetrisPlanner": "specdec.tetris",
    "VocabMap": "specdec.drafters.vocab_map",
    "bundled_path": "specdec.bundled",
}


def __getattr__(name: str) -> object:
    """The public name, loaded from the module that defines it."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
