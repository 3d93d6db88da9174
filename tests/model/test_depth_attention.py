"""The operator, held to its readable reference: values, gradients, extremes, memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.depth_attention import (
    CHUNK_ELEMENTS,
    depth_attention,
    depth_key,
    inverse_rms,
    merge_partial,
    read_finished,
    reference,
)

EPS = 1e-5
CLEAR_REFS = Path("/proc/self/clear_refs")
NUM_SOURCES, TOKENS, HIDDEN = 8, 4096, 512  # where memory is measured


def make_inputs(
    num_sources: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, query_scale: float = 0.3
) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_sources)
    sources = [(1 + i) * torch.randn(shape, generator=generator) for i in range(num_sources)]
    query = query_scale * torch.randn(shape[-1], generator=generator)
    key_gain = 1 + 0.2 * torch.randn(shape[-1], generator=generator)
    return (
        [s.to(dtype).requires_grad_() for s in sources],
        query.to(dtype).requires_grad_(),
        key_gain.to(dtype).requires_grad_(),
    )


def value_and_gradients(operator, sources: list[Tensor], query: Tensor, key_gain: Tensor) -> list[Tensor]:
    output = operator(sources, query, key_gain, EPS)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.dtype)
    return [output, *torch.autograd.grad(output, [*sources, query, key_gain], upstream)]


def in_fp64(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def relative_errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True)]


def two_phase(sources: list[Tensor], query: Tensor, key_gain: Tensor, eps: float) -> Tensor:
    key = depth_key(query, key_gain)
    statistics = [inverse_rms(source, eps) for source in sources]
    [(mean, scalars)], _ = read_finished(sources[:-1], statistics[:-1], [key])
    return merge_partial(mean, scalars, sources[-1], statistics[-1], key)[0]


@pytest.mark.parametrize("num_sources", [1, 3])
def test_gradcheck(num_sources: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 3 * 5)  # four tokens: two chunks
    tensors = in_fp64([*(inputs := make_inputs(num_sources, (2, 2, 5)))[0], *inputs[1:]])
    assert torch.autograd.gradcheck(lambda q, g, *s: depth_attention(s, q, g, EPS), (*tensors[-2:], *tensors[:-2]))


def test_gradcheck_of_readers_that_share_a_pass_and_merge() -> None:
    tensors = in_fp64([*(inputs := make_inputs(3, (3, 4)))[0], *inputs[1:]])

    def readers(query: Tensor, key_gain: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        statistics = [inverse_rms(source, EPS) for source in sources]
        keys = [depth_key(query, key_gain), depth_key(0.3 * query, key_gain), depth_key(query.square(), key_gain)]
        reads, finished = read_finished(sources[:-1], statistics[:-1], keys)
        first, partial = merge_partial(*reads[0], sources[-1], statistics[-1], keys[0])
        third, partial = merge_partial(*reads[2], partial, statistics[-1], keys[2])
        return first, reads[1][0], third, partial, *finished

    assert torch.autograd.gradcheck(readers, (*tensors[-2:], *tensors[:-2]))


@pytest.mark.parametrize("operator", [depth_attention, two_phase])
@pytest.mark.parametrize("num_sources", [2, 3, 9, 33])
@pytest.mark.parametrize("shape", [(2, 37, 40), (5, 129), (1, 1, 3)])
def test_fp32_agrees_with_the_reference(operator, num_sources: int, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(num_sources, shape)
    *sources, query, key_gain = in_fp64([*inputs[0], *inputs[1:]])
    exact = value_and_gradients(reference, sources, query, key_gain)
    assert max(relative_errors(value_and_gradients(operator, *inputs), exact)) < 3e-6


@pytest.mark.parametrize("operator", [depth_attention, two_phase])
@pytest.mark.parametrize("num_sources", [2, 9, 33])
def test_bf16_agrees_with_the_reference(operator, num_sources: int) -> None:
    # Rounding to bf16 costs 2e-3 at most. What it rounds: the output, every gradient, and in two phases the output that
    # backward starts from.
    bound = 6e-3 if operator is two_phase else 4e-3
    inputs = make_inputs(num_sources, (3, 37, 40), torch.bfloat16)
    *sources, query, key_gain = in_fp64([*inputs[0], *inputs[1:]])
    exact = value_and_gradients(reference, sources, query, key_gain)
    actual = value_and_gradients(operator, *inputs)
    assert {tensor.dtype for tensor in actual} == {torch.bfloat16}
    assert max(relative_errors(actual, exact)) < bound


def test_a_single_source_is_the_identity() -> None:
    [source], query, key_gain = make_inputs(1, (4, 9))
    output, source_gradient, *others = value_and_gradients(depth_attention, [source], query, key_gain)
    upstream = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output, source) and torch.equal(source_gradient, upstream)
    assert not any(gradient.any() for gradient in others)


@pytest.mark.parametrize("operator", [depth_attention, two_phase])
def test_extreme_logits_neither_overflow_nor_vanish(operator) -> None:
    sources, query, key_gain = make_inputs(6, (11, 16))
    with torch.no_grad():
        query.copy_(sources[2][0] / sources[2][0].norm() * 1e4)
        sources[4].zero_()
    logits = torch.stack([inverse_rms(s, EPS) * (s @ (query * key_gain)) for s in sources])
    assert logits.abs().max() > 1e4
    actual = value_and_gradients(operator, sources, query, key_gain)
    *exact_sources, exact_query, exact_gain = in_fp64([*sources, query, key_gain])
    exact = value_and_gradients(reference, exact_sources, exact_query, exact_gain)
    assert all(tensor.isfinite().all() for tensor in actual)
    torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-3, atol=1e-3)
    # A zero source has the largest gradient there is: its RMS is the epsilon alone.
    assert relative_errors([actual[5]], [exact[5]])[0] < 1e-2


@pytest.mark.parametrize("operator", [depth_attention, two_phase])
def test_layout_does_not_matter(operator) -> None:
    sources, query, key_gain = make_inputs(4, (6, 5, 24))
    expected = value_and_gradients(operator, sources, query, key_gain)
    strided = [torch.empty(24, 5, 6).permute(2, 1, 0).copy_(s.detach()).requires_grad_() for s in sources]
    wide_query = torch.stack([query.detach()] * 3, 1)[:, 1].requires_grad_()
    assert not strided[0].is_contiguous() and not wide_query.is_contiguous()
    actual = value_and_gradients(operator, strided, wide_query, key_gain)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def test_readers_keep_their_bits_whoever_shares_their_pass() -> None:
    sources, query, key_gain = make_inputs(5, (3, 41, 24))
    others = [depth_key(query + i, key_gain) for i in range(1, 5)]
    upstream = [torch.randn(3, 41, 24, generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def gradients(groups: list[list[Tensor]]) -> list[Tensor]:
        finished, statistics = tuple(sources), [inverse_rms(source, EPS) for source in sources]
        means: list[Tensor] = []
        for keys in groups:
            reads, finished = read_finished(finished, statistics, keys)
            means += [mean for mean, _ in reads]
        return [*means, *torch.autograd.grad(means, [*sources, query, key_gain], upstream, retain_graph=True)]

    keys = [depth_key(query, key_gain), *others]
    whole = gradients([keys])
    for groups in ([keys[:2], keys[2:]], [keys[:1], keys[1:4], keys[4:]], [[key] for key in keys]):
        assert all(torch.equal(a, b) for a, b in zip(whole, gradients(groups), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_memory_is_scalars(dtype: torch.dtype) -> None:
    num_sources, tokens, hidden = 9, 64, 128
    sources, query, key_gain = make_inputs(num_sources, (tokens, hidden), dtype)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*sources, query, key_gain)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = depth_attention(sources, query, key_gain, EPS)
    keys = 3 * hidden * 4  # query and gain in fp32, and their product
    assert output.requires_grad and sum(saved.values()) <= keys + 16 * tokens * num_sources


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak of a process's memory can be reset on Linux alone")
def test_peak_memory_is_the_output_and_a_few_chunks() -> None:
    # A process of its own, where a large tensor is mapped when made and unmapped when freed: resident size is exact.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    program = f"import runpy; runpy.run_path({__file__!r})['print_peak_memory']()"
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    forward, backward = (float(line) for line in run.stdout.split())
    scalars = 16 * NUM_SOURCES / (4 * HIDDEN)
    # In units of one source, of which a chunk is an eighth. The reference grows by about 24.
    assert forward < 1 + scalars + 0.25
    assert backward < NUM_SOURCES + scalars + 0.25


def print_peak_memory() -> None:
    """Growth of the process during forward, and during backward, in units of one source."""
    sources, query, key_gain = make_inputs(NUM_SOURCES, (TOKENS, HIDDEN))
    upstream = torch.ones(TOKENS, HIDDEN)
    for warm in (False, True):  # the first round loads code
        before = reset_peak_memory()
        output = depth_attention(sources, query, key_gain, EPS)
        forward = peak_memory() - before
        before = reset_peak_memory()
        torch.autograd.grad(output, [*sources, query, key_gain], upstream)
        if warm:
            print(forward / upstream.nbytes, (peak_memory() - before) / upstream.nbytes)
        del output


def reset_peak_memory() -> int:
    """Make the highest resident size of this process its present one; returns that, in bytes."""
    CLEAR_REFS.write_text("5")
    return peak_memory()


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
