"""TrunkShape: the sizes of a model's dense part, read from its config."""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class TrunkShape:
    """max_model_len: tokens of prompt and answer together."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int
    max_model_len: int


def shape_of(config: PreTrainedConfig) -> TrunkShape:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return TrunkShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
    )
