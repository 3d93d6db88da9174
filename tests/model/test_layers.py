"""What the layers compute, held to the paper's statements and to plain PreNorm."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.flops import flops_per_token, num_depth_parameters, num_parameters
from model.language_model import LanguageModel
from model.layers import build_layer, no_weight_decay
from model.loss import cross_entropy


def make_config(residual: str = "block", **changes: object) -> ModelConfig:
    shape: dict = dict(
        vocab_size=53,
        residual=residual,
        layers_per_block=2,
        num_hidden_layers=5,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    return ModelConfig(**(shape | changes))


def random_ids() -> Tensor:
    return torch.randint(53, (2, 19), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("residual", ["block", "full"])
def test_zero_queries_are_the_prenorm_network(residual: str) -> None:
    # In fp64, and with an epsilon that vanishes there: what is left is the statement itself.
    prenorm = LanguageModel(make_config("standard", rms_norm_eps=1e-30), seed=1).double()
    depth = LanguageModel(make_config(residual, rms_norm_eps=1e-30), seed=1).double()
    depth.load_state_dict(prenorm.state_dict(), strict=False)
    ids = random_ids()
    for model in (prenorm, depth):
        cross_entropy(model(ids), ids.roll(-1, 1)).backward()
    torch.testing.assert_close(depth(ids), prenorm(ids), rtol=1e-6, atol=1e-9)
    shared = dict(depth.named_parameters())
    for name, parameter in prenorm.named_parameters():
        torch.testing.assert_close(shared[name].grad, parameter.grad, rtol=1e-5, atol=1e-9)


def test_source_counts_are_the_papers() -> None:
    assert [make_config("block").num_sources(index) for index in range(6)] == [1, 2, 2, 3, 3, 4]
    assert {make_config("standard").num_sources(index) for index in range(6)} == {1}
    kimi_k3 = make_config("block", num_hidden_layers=93, layers_per_block=12)
    assert kimi_k3.num_sources(93) == 9
    paper_48b = make_config("block", num_hidden_layers=27, layers_per_block=3)
    assert paper_48b.num_sources(27) == 10


@pytest.mark.parametrize("residual", ["standard", "block", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted(residual: str, tied: bool) -> None:
    config = make_config(residual, tie_word_embeddings=tied)
    model = LanguageModel(config, seed=1)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    queries_and_gains = [p for name, p in model.named_parameters() if name.endswith(("query", "key_gain"))]
    expected = 0 if residual == "standard" else 2 * 32 * (2 * 5 + 1)
    assert num_depth_parameters(config) == sum(p.numel() for p in queries_and_gains) == expected


def test_initialisation_is_a_function_of_config_index_and_seed() -> None:
    config = make_config()
    torch.manual_seed(0)
    layers = [build_layer(config, index, seed=5) for index in reversed(range(7))][::-1]
    model = LanguageModel(config, seed=5)
    for layer, same in zip(layers, model.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), same.parameters(), strict=True))
    assert not torch.equal(layers[1].mlp.down_proj.weight, layers[2].mlp.down_proj.weight)
    assert not torch.equal(layers[1].mlp.down_proj.weight, build_layer(config, 1, seed=6).mlp.down_proj.weight)
    tied = make_config(tie_word_embeddings=True)
    assert torch.equal(build_layer(tied, 0, seed=5).weight, build_layer(tied, 6, seed=5).weight)


def test_gains_and_queries_are_not_decayed() -> None:
    names = {
        name for name, p in LanguageModel(make_config(), seed=1).named_parameters() if not no_weight_decay(name, p)
    }
    assert {name.split(".", 2)[2] for name in names} == {
        "weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    }


def test_a_token_sees_no_later_token() -> None:
    model = LanguageModel(make_config(), seed=1)
    ids = random_ids()
    changed = ids.clone()
    changed[:, 12:] = 0
    assert torch.equal(model(ids)[:, :12], model(changed)[:, :12])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"residual": "blocks"}, "residual"),
        ({"hidden_size": 30}, "hidden_size"),
        ({"hidden_size": 36}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"layers_per_block": 2.0}, "layers_per_block"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ],
)
def test_a_wrong_shape_names_its_key(changes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: "):
        make_config(**changes)


def test_loss_is_fp32_from_bf16_logits() -> None:
    logits = torch.randn(2, 3, 11).bfloat16()
    loss = cross_entropy(logits, torch.randint(11, (2, 3)))
    assert loss.dtype == torch.float32 and loss.ndim == 0


def test_flops_of_a_known_shape() -> None:
    # Llama-like, 2 heads of 4, one layer: every term by hand.
    config = ModelConfig(10, "block", 1, 1, 8, 2, 1, 12)
    matmuls = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 10 * 8
    attention = 2 * 2 * 8 * (5 + 1) / 2
    reads = 1 + 2 + 2  # embedding; embedding and partial; the same at the head
    assert flops_per_token(config, 5) == 3 * (2 * matmuls + attention + 6 * 8 * reads)
