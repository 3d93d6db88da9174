"""The shape of a model: what a user writes under `model:` plus the vocabulary size that the tokenizer brings."""

from dataclasses import dataclass
from typing import Literal, get_args

Residual = Literal["standard", "block", "full"]


@dataclass(frozen=True)
class ModelConfig:
    """Keys carry the names of Hugging Face's Llama configuration; `residual` and `layers_per_block` are ours.

    residual: `standard` (x + f(x)), `block` (depth attention over blocks of `layers_per_block` layers and the running
    partial), `full` (depth attention over every sublayer's output). Raises ValueError; the message starts with the key.
    """

    vocab_size: int
    residual: Residual = "block"
    layers_per_block: int = 2
    num_hidden_layers: int = 8
    hidden_size: int = 256
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 704
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.residual not in get_args(Residual):
            raise ValueError(f"residual: {self.residual!r} is not one of {', '.join(get_args(Residual))}")
        sizes = ("vocab_size", "layers_per_block", "num_hidden_layers", "hidden_size", "num_attention_heads")
        for key in (*sizes, "num_key_value_heads", "intermediate_size"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}: {value!r} is not a positive integer")
        for key in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not a positive number")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"hidden_size: {self.head_size} per head is odd; rotary embeddings need an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_block_start(self, layer_index: int) -> bool:
        """Whether layer `layer_index` (from 0) commits the partial to the sources and starts a new one."""
        return self.residual == "full" or (self.residual == "block" and layer_index % self.layers_per_block == 0)

    def num_sources(self, layer_index: int) -> int:
        """Number of tensors alive, finished sources and the partial, at the entrance of layer `layer_index`.

        `layer_index` runs from 0 to `num_hidden_layers`, which is the output head. A hop before that layer carries
        exactly these tensors. Paper section 3: embedding, finished blocks and the block under way.
        """
        if not 0 <= layer_index <= self.num_hidden_layers:
            raise ValueError(f"layer_index: {layer_index} is not between 0 and {self.num_hidden_layers}")
        if self.residual == "standard":
            return 1
        if self.residual == "full":
            return 2 * layer_index + 1
        return -(-layer_index // self.layers_per_block) + 1
