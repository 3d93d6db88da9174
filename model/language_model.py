"""The whole model as one plain module: for generation, evaluation, and as the truth that pipelines are held to."""

from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import build_layer, forward_layers


class LanguageModel(nn.Module):
    """All layers of `config` in one process. State-dict keys are `layers.{index}.…`, with `build_layer`'s indices."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(build_layer(config, index, seed) for index in range(config.num_hidden_layers + 2))
        if config.tie_word_embeddings:
            self.layers[-1].weight = self.layers[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[batch, sequence]` (int64) to logits `[batch, sequence, vocab]`."""
        logits: Tensor = forward_layers(list(self.layers), ids)
        return logits
