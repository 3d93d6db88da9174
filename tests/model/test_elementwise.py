"""The layer's elementwise operators against torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.depth_attention import CHUNK_ELEMENTS
from model.elementwise import rms_norm, rotate, swiglu


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def make_input(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 50)


def test_gradcheck() -> None:
    gain = make_input(torch.float64, 6)
    assert torch.autograd.gradcheck(lambda x, g: rms_norm(x, g, 1e-5), (make_input(torch.float64, 3, 4, 6), gain))
    assert torch.autograd.gradcheck(swiglu, make_input(torch.float64, 3, 4, 10))
    assert torch.autograd.gradcheck(lambda x: rotate(x, 50.0), make_input(torch.float64, 1, 2, 3, 4))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_agreement_with_torch(dtype: torch.dtype, bound: float) -> None:
    x, gain = make_input(dtype, 7, 5, 12), make_input(dtype, 12)
    upstream = make_input(dtype, 7, 5, 12).detach()
    pairs = [
        (rms_norm(x, gain, 1e-5), F.rms_norm(x.double(), (12,), gain.double(), 1e-5), upstream, [x, gain]),
        (swiglu(x), torch_swiglu(x.double()), upstream[..., :6], [x]),
    ]
    for actual, exact, gradient, leaves in pairs:
        assert actual.dtype == dtype
        actual_gradients = torch.autograd.grad(actual, leaves, gradient)
        exact_gradients = torch.autograd.grad(exact, leaves, gradient.double())
        for a, e in zip((actual, *actual_gradients), (exact, *exact_gradients), strict=True):
            assert (a.double() - e.double()).norm() <= bound * e.double().norm()


def test_only_inputs_are_saved() -> None:
    x, gain = make_input(torch.float32, 8, 16), make_input(torch.float32, 16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, gain, 1e-5)
        swiglu(x)
    kept = [t for t in saved if t.data_ptr() not in (x.data_ptr(), gain.data_ptr())]
    assert [t.shape for t in kept] == [(8,)]  # the inverse RMS


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rotation_is_a_complex_product(dtype: torch.dtype, bound: float) -> None:
    x = make_input(dtype, 2, 3, 11, 8).detach()
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    angles = torch.outer(torch.arange(11), 100.0 ** -(torch.arange(4) / 4)).double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert (rotate(x, 100.0).double() - expected).norm() <= bound * expected.norm()


def test_training_follows_inference_mode() -> None:
    x = make_input(torch.float32, 1, 2, 13, 6)
    with torch.inference_mode():
        inferred = rotate(x.detach(), 77.0)  # makes and caches the tables
    trained = rotate(x, 77.0)
    trained.sum().backward()
    assert torch.equal(trained, inferred)
