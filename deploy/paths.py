"""Where this checkout is. Relative paths of a config are from here: `build` never sees where the file was."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

ROOT = Path(__file__).resolve().parents[1]


def _from_root(path: Path) -> Path:
    return ROOT / path


FromRoot = Annotated[Path, AfterValidator(_from_root)]
