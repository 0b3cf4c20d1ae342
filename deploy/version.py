"""The version of sparkmoe, whether it is installed or runs from a checkout."""

import tomllib
from importlib import metadata

from deploy.paths import ROOT


def version() -> str:
    """Return the version of the checkout that runs, or of the installed package if there is no checkout."""
    file = ROOT / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text()).get("project", {})
        if project.get("name") == "sparkmoe":
            return project["version"]
    return metadata.version("sparkmoe")
