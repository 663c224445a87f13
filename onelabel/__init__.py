"""onelabel: train a 3D segmentation network from one labelled scan, and know which of its masks to trust."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onelabel.tasks.strip_one import Stripped, strip

__all__ = ["Stripped", "__version__", "strip"]
__version__ = "0.1.0"

# In a checkout (or a job's working_dir) the packages lie beside this folder; in a wheel they lie inside it.
if not (Path(__file__).parent / "orchestrator").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name in ("Stripped", "strip"):
        return getattr(import_module("onelabel.tasks.strip_one"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
