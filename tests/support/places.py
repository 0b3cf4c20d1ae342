"""Paths that tests and benchmarks share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository's root, where modules are run from."""

DEMO_CONFIG = ROOT / "configs" / "demo.yaml"
"""The deployment of the demo model: a router and two expert shards."""

DEMO_MODEL = ROOT / "configs" / "demo-model"
"""The trained 21M-parameter checkpoint, its experts in NVFP4."""

HELDOUT = ROOT / "tests" / "data" / "heldout.txt"
"""Text that the demo model was not trained on."""
