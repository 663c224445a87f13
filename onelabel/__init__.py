"""onelabel: train a 3D segmentation network from one labelled scan, and know which of its masks to trust."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout (or a job's working_dir) the packages lie beside this folder; in a wheel they lie inside it.
if not (Path(__file__).parent / "orchestrator").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
