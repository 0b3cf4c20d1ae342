"""Which version of sparkmoe this is, installed or not."""

import tomllib
from importlib import metadata

from deploy.paths import ROOT


def version() -> str:
    """Of the checkout that runs, else of the installed package."""
    file = ROOT / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text()).get("project", {})
        if project.get("name") == "sparkmoe":
            return project["version"]
    return metadata.version("sparkmoe")
