"""Tests of what the engine is built from."""

from safetensors.torch import load_file

from deploy.engine.build import shard_bytes
from tests.support.places import DEMO_MODEL


def test_what_a_shard_takes_is_known_before_it_loads() -> None:
    """The bytes of its share of the experts on disk: FP4 weights and their block scales."""
    tensors = {
        name: one for file in DEMO_MODEL.glob("*.safetensors") for name, one in load_file(file).items()
    }
    on_disk = sum(
        one.nbytes
        for name, one in tensors.items()
        if ".experts." in name and name.endswith(("weight", "weight_scale"))
    )
    assert shard_bytes(DEMO_MODEL, num_shards=1) == on_disk
    assert shard_bytes(DEMO_MODEL, num_shards=2) == on_disk // 2
