"""Tests of what a process of ours writes to stderr."""

import json
import subprocess
import sys
from datetime import datetime

from tests.support.places import ROOT


def test_our_info_lines_come_out_once_and_others_do_not() -> None:
    code = """
import logging
from deploy import logs
logs.configure("text")
logs.configure("text")
for name in ("deploy.fleet.fleet", "experts.shard", "router.engine", "somebody.else"):
    logging.getLogger(name).info("hello")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    written = [line.split(" ", 2)[2] for line in done.stderr.splitlines()]
    assert written == [
        f"INFO {name}: hello" for name in ("deploy.fleet.fleet", "experts.shard", "router.engine")
    ]


def test_json_is_an_object_in_a_line() -> None:
    code = """
import logging
from deploy import logs
logs.configure("json")
logs.request_id.set("req_1")
log = logging.getLogger("router.engine")
log.info("two\\nlines", extra={"fields": {"seconds": 0.5}})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stderr.splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "level": "INFO",
        "logger": "router.engine",
        "message": "two\nlines",
        "request_id": "req_1",
        "seconds": 0.5,
    }
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith("ZeroDivisionError: division by zero")


def test_a_line_of_a_request_begins_with_its_id() -> None:
    code = """
import logging
from deploy import logs
logs.configure("text")
logs.request_id.set("req_1")
logging.getLogger("deploy.x").warning("one\\rtwo")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.split(" ", 2)[2] == "WARNING deploy.x: req_1: one\\rtwo\n"
