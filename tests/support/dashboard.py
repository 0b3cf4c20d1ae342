"""The Grafana dashboard deploy/grafana/sparkmoe.json, as tests look at it."""

import json
import re
from typing import Any

from tests.support.places import ROOT

FILE = ROOT / "deploy" / "grafana" / "sparkmoe.json"


def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def metrics_shown() -> set[str]:
    """Return the names of the metrics that the dashboard shows, as Prometheus knows them: with Ray's prefix,
    and a histogram's `_bucket`."""
    return {name for expression in expressions() for name in re.findall(r"ray_\w+", expression)}
