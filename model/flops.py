"""Counts for MFU and for the plan before a run: arithmetic of one token, parameters of the model."""

from model.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    hidden = config.hidden_size
    per_layer = _matmul_parameters_per_layer(config) + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * per_layer + hidden + num_depth_parameters(config)


def num_depth_parameters(config: ModelConfig) -> int:
    """Parameters of depth attention: a query and a key gain for every sublayer and for the head."""
    if config.residual == "standard":
        return 0
    return 2 * config.hidden_size * (2 * config.num_hidden_layers + 1)


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations that training spends on one token, forward and backward, without recomputation.

    Matmuls count 2 per weight and token (the output head's too, the embedding's look-up not), causal attention 2 per
    channel for scores and for values over half the sequence on average, depth attention 6 per source channel and read
    (square, key dot product, weighted sum). The backward pass counts twice the forward, as in PaLM (arXiv:2204.02311,
    appendix B), which differs in counting attention over the whole sequence.
    """
    matmuls = config.num_hidden_layers * _matmul_parameters_per_layer(config) + config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * 4 * config.hidden_size * (sequence_length + 1) / 2
    depth = 6 * config.hidden_size * _num_depth_reads(config)
    return 3.0 * (2 * matmuls + attention + depth)


def _matmul_parameters_per_layer(config: ModelConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_size + 3 * config.intermediate_size)


def _num_depth_reads(config: ModelConfig) -> int:
    """Sources read per token, summed over all sublayers and the head."""
    if config.residual == "standard":
        return 0
    reads = config.num_sources(config.num_hidden_layers)
    for index in range(config.num_hidden_layers):
        # After the attention sublayer of a block start the committed partial and a new one both stand to be read.
        reads += 2 * config.num_sources(index) + config.is_block_start(index)
    return reads
