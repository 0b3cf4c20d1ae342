"""The root directory of this checkout, from which the relative paths of a config are read.

They are not read from the config file's own directory, because `deploy.app.build` never sees where the file
was.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

ROOT = Path(__file__).resolve().parents[1]


def _from_root(path: Path) -> Path:
    return ROOT / path


FromRoot = Annotated[Path, AfterValidator(_from_root)]
"""A path of a config; a relative one is taken from ROOT."""
