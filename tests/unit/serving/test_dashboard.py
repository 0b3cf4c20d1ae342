"""The Grafana dashboard is one that Grafana takes; test_metrics.py tests what it shows."""

import itertools
import re
from typing import Any

from tests.support.dashboard import dashboard, expressions

PANELS = dashboard()["panels"]


def test_what_only_grows_is_shown_by_how_fast() -> None:
    for expression in expressions():
        growing = re.findall(r"ray_\w+_(?:total|bucket)\b", expression)
        rates = re.findall(r"(?:rate|increase)\(ray_\w+\[\$__rate_interval\]\)", expression)
        assert len(rates) == len(growing), expression


def test_panels_have_ids_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in itertools.combinations(PANELS, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_every_panel_asks_the_data_source_that_is_chosen_above() -> None:
    (variable,) = dashboard()["templating"]["list"]
    chosen = {"type": variable["query"], "uid": f"${{{variable['name']}}}"}
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["datasource"] == chosen
            assert all(target["datasource"] == chosen for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )
