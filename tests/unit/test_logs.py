"""What a process of ours writes to stderr."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_our_info_lines_come_out_once_and_others_do_not() -> None:
    code = """
import logging
from deploy import logs
logs.configure("text")
logs.configure("text")
for name in ("deploy.fleet", "experts.shard", "router.engine", "somebody.else"):
    logging.getLogger(name).info("hello")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    written = [line.split(" ", 2)[2] for line in done.stderr.splitlines()]
    assert written == [f"INFO {name}: hello" for name in ("deploy.fleet", "experts.shard", "router.engine")]
