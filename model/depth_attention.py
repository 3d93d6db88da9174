"""Depth attention: every token attends over the sources that the network has produced so far (arXiv:2603.15031).

Plain torch, and this file alone. `depth_attention` is one read. The sublayers of one block share most of theirs: they
all read the finished sources, and each its own version of the running partial. `read_finished` does the first part for
all of them in one pass, `merge_partial` adds the partial to one of them (two-phase computation, paper section 4.2).

**Nothing is kept that can be recomputed.** A read saves references to the sources and, in fp32, one logit per token and
source; whoever reads a source again brings its inverse RMS, which is computed once.

**The bits do not depend on who shares a pass.** A stage of a pipeline may hold any part of a block, so the readers of
one pass vary with the cut. Therefore every reader has its own matrix-vector products and its own softmax: one matrix
product for all rounds differently with the number of its columns (MKL does below 12), and is three times slower at 4
readers, three times faster at 24. And the gradient of a source is a left fold: what arrived from later layers, then
each reader's share, the last reader first. The sources pass through `read_finished` unchanged so that what arrived is
at hand there, and nothing is left for autograd to add up.

**Bytes moved per token**, in units of one source's token, for N sources and S readers, chunks counted while in cache:

|                             | forward                 | backward |
|-----------------------------|-------------------------|----------|
| `reference`                 | 11 N + 1                | 24 N     |
| `depth_attention`           | 2 N + 1                 | 2 N + 1  |
| `read_finished`, S readers  | N + S, + 1 a new source | 3 N + S  |
| `merge_partial`, one reader | 4                       | 5        |

A sublayer in a block thus moves N / S + 5 forward, as in the paper's table 1. What the N sources' gradients cost to add
up is inside the 3 N of `read_finished`, and comes on top of `depth_attention`.

**Devices.** Every device runs this plain torch; only the size of a chunk is chosen by device. A fused kernel's place is
under the two `autograd.Function`s, chosen by the sources' device; none is here, as none has been measured here.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk of a tensor, in elements: large enough that a call costs more than its launch, small enough that the chunks of
# all sources stay in cache from the logits to the weighted sum. It must depend on nothing that a cut can change.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


def reference(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor, eps: float) -> Tensor:
    """`depth_attention` in its most readable form: what the fast operators are held to.

    Paper equations 1 to 4 (and 5, 6, where the sources are blocks): the logit of a source is
    `query . (key_gain * RMSNorm(source))` with no scale; the values are the raw sources. Computes in fp32 or wider.
    """
    wide = _wide(sources[0])
    values = torch.stack([source.to(wide) for source in sources])
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    weights = (keys @ (query.to(wide) * key_gain.to(wide))).softmax(0)
    return (weights.unsqueeze(-1) * values).sum(0).to(sources[0].dtype)


def depth_attention(
    sources: Sequence[Tensor], query: Tensor, key_gain: Tensor, eps: float, statistics: Sequence[Tensor] = ()
) -> Tensor:
    """Softmax over sources of `query . (key_gain * RMSNorm(source))`, then the weighted sum of the raw sources.

    sources: one or more tensors `[..., hidden]` of one shape and dtype. query, key_gain: `[hidden]`.
    Returns `[..., hidden]` in the dtype of the sources; statistics, softmax and sums are fp32 whatever that is (fp64
    for fp64). Differentiable once. Equations as in `reference`. statistics: `inverse_rms` of the first sources, where
    the caller has it.
    """
    statistics = [*statistics, *(inverse_rms(source, eps) for source in sources[len(statistics) :])]
    [(mean, _)], _ = read_finished(sources, statistics, [depth_key(query, key_gain)])
    return mean.to(sources[0].dtype)


def attention_weights(sources: Sequence[Tensor], key: Tensor, eps: float) -> Tensor:
    """The softmax weights of a read with `key = depth_key(...)`: `[num_sources, ...]` in fp32, for diagnostics."""
    norms = [inverse_rms(source, eps).view(source.shape[:-1]) for source in sources]
    logits = [(source.to(key.dtype) @ key) * norm for source, norm in zip(sources, norms, strict=True)]
    return torch.stack(logits).softmax(0)


def depth_key(query: Tensor, key_gain: Tensor) -> Tensor:
    """`query * key_gain`, the vector that meets a normalised source: `[hidden]`, fp32.

    Multiplied in fp32: a product rounded to bf16 moves the output by half a percent at logits of ordinary size.
    """
    wide = _wide(query)
    return query.to(wide) * key_gain.to(wide)


@torch.no_grad()
def inverse_rms(source: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(source^2) + eps)` over the last dimension, flat over the others: `[tokens]`, fp32.

    Not differentiable by itself: the reads that take it differentiate through it.
    """
    rows = _rows(source)
    norms = torch.empty(len(rows), dtype=_wide(source), device=source.device)
    for part in chunks(rows):
        torch.linalg.vector_norm(rows[part].to(norms.dtype), dim=-1, out=norms[part])
    return norms.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()


def read_finished(
    sources: Sequence[Tensor], statistics: Sequence[Tensor], keys: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """Read all `sources` (each `[..., hidden]`) with every one of `keys` (each `[hidden]`, fp32) in one pass.

    statistics: `inverse_rms` of each source. Returns for every key the weighted mean `[..., hidden]` in fp32 and its
    `scalars` for `merge_partial`; then the sources again, which is what later reads must take, so that their gradients
    arrive here.

    A mean may be used as it is, or be handed to `merge_partial` together with its scalars, and to nothing else.
    """
    outputs = _ReadFinished.apply(len(keys), *keys, *sources, *statistics)
    means, scalars = outputs[: len(keys)], outputs[len(keys) : 2 * len(keys)]
    return list(zip(means, scalars, strict=True)), outputs[2 * len(keys) :]


def merge_partial(
    mean: Tensor, scalars: Tensor, partial: Tensor, statistic: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Add one more source to a read by online softmax: what `depth_attention` over `[*sources, partial]` returns.

    mean, scalars: from `read_finished` with the same `key`; `mean` is overwritten. statistic: `inverse_rms` of
    `partial` `[..., hidden]`. Returns the result in the dtype of `partial`; then `partial` again, for later use.
    """
    result, partial = _MergePartial.apply(mean, scalars, partial, statistic, key)
    return result, partial


class _ReadFinished(torch.autograd.Function):
    """Backward speaks a protocol with `_MergePartial`, for a scaled copy of each gradient would cost a pass of its own.

    The gradient of a mean is that of the read's final result. The gradient of its `scalars` `[2, tokens]`, whose first
    row is the log of the softmax's denominator, carries what only the merge knows: `delta`, the dot product of the
    result with its gradient, and the share of the finished sources in the softmax. None if there was no merge.
    """

    @staticmethod
    def forward(ctx: Any, num_keys: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        num_sources = (len(tensors) - num_keys) // 2
        keys, sources, statistics = _split(tensors, num_keys, num_sources, num_sources)
        rows = [_rows(source) for source in sources]
        inverse = torch.stack(list(statistics))
        means = [inverse.new_empty(sources[0].shape) for _ in keys]
        mean_rows = [_rows(mean) for mean in means]
        logits = [torch.empty_like(inverse) for _ in keys]
        scalars = [inverse.new_ones(2, len(rows[0])) for _ in keys]
        for part in chunks(rows[0]):
            values = [row[part].to(inverse.dtype) for row in rows]
            for i, value in enumerate(values):
                for key, logit in zip(keys, logits, strict=True):
                    torch.mv(value, key, out=logit[i, part])
            for mean, logit, scalar in zip(mean_rows, logits, scalars, strict=True):
                logit[:, part] *= inverse[:, part]
                weights = logit[:, part].softmax(0).unsqueeze(-1)
                torch.logsumexp(logit[:, part], 0, out=scalar[0, part])
                torch.mul(values[0], weights[0], out=mean[part])
                for value, weight in zip(values[1:], weights[1:], strict=True):
                    mean[part].addcmul_(value, weight)
        ctx.num_keys = num_keys
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*keys, *sources, *logits, inverse)
        return (*means, *scalars, *sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        num_keys = ctx.num_keys
        num_sources = len(gradients) - 2 * num_keys
        keys, sources, logits, [inverse] = _split(ctx.saved_tensors, num_keys, num_sources, num_keys, 1)
        results, scalars, arrived = _split(gradients, num_keys, num_keys, num_sources)
        rows = [_rows(source) for source in sources]
        arrived_rows = [None if gradient is None else _rows(gradient) for gradient in arrived]
        row_gradients = [torch.empty_like(row) for row in rows]
        key_gradients = [inverse.new_zeros(num_sources, rows[0].shape[1]) for _ in keys]
        result_rows = [_rows(_defined(result, sources[0])) for result in results]
        scratch = row_scratch(rows[0], inverse.dtype)
        for part in chunks(rows[0]):
            values = [row[part].to(inverse.dtype) for row in rows]
            reads = []
            for g, key in enumerate(keys):
                result, logit = result_rows[g][part].to(inverse.dtype), logits[g][:, part]
                dots = torch.stack([_row_dot(result, value, scratch) for value in values])
                weights = logit.softmax(0)
                if scalars[g] is None:
                    delta = (weights * dots).sum(0)
                else:
                    delta, share = scalars[g][:, part]
                    weights *= share
                slopes = weights * (dots - delta) * inverse[:, part]
                pulls = slopes * logit * inverse[:, part] / -key.numel()
                for value, slope, key_gradient in zip(values, slopes, key_gradients[g], strict=True):
                    key_gradient.addmv_(value.T, slope)
                reads.append(_Read(result, key, weights.unsqueeze(-1), slopes, pulls.unsqueeze(-1)))
            for i, value in enumerate(values):
                before = _part(arrived_rows[i], part)
                for read in reversed(reads):
                    before = read.add_gradient(before, i, value, out=row_gradients[i][part])
        source_gradients = [
            gradient.view(source.shape) for gradient, source in zip(row_gradients, sources, strict=True)
        ]
        return (None, *(g.sum(0) for g in key_gradients), *source_gradients, *[None] * num_sources)


class _MergePartial(torch.autograd.Function):
    """Online softmax of a finished read with one more source; for its backward see `_ReadFinished`."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, scalars: Tensor, partial: Tensor, statistic: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, mean_rows = _rows(partial), _rows(mean)
        logit = torch.empty_like(statistic)
        for part in chunks(rows):
            value = rows[part].to(mean.dtype)
            torch.mv(value, key, out=logit[part])
            logit[part] *= statistic[part]
            # The weights of the two sum to one, so that their sum is an interpolation: one pass in place of two.
            mean_rows[part].lerp_(value, torch.sigmoid(logit[part] - scalars[0, part]).unsqueeze(-1))
        if partial.dtype == mean.dtype:
            ctx.mark_dirty(mean)
        result = mean.to(partial.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(result, scalars, partial, statistic, key, logit)
        return result, partial

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        result, scalars, partial, statistic, key, logit = ctx.saved_tensors
        gradient = _defined(gradient, result)
        rows, result_rows, gradient_rows = _rows(partial), _rows(result), _rows(gradient)
        arrived_rows = None if arrived is None else _rows(arrived)
        row_gradient = torch.empty_like(rows)
        key_gradient = torch.zeros_like(key)
        scalar_gradient = torch.empty_like(scalars)
        scratch = row_scratch(rows, key.dtype)
        for part in chunks(rows):
            value, result_gradient = rows[part].to(key.dtype), gradient_rows[part].to(key.dtype)
            delta = _row_dot(result_gradient, result_rows[part], scratch)
            dot = _row_dot(result_gradient, value, scratch)
            excess = logit[part] - scalars[0, part]
            weight = excess.sigmoid()
            slope = weight * (dot - delta) * statistic[part]
            pull = slope * logit[part] * statistic[part] / -key.numel()
            key_gradient.addmv_(value.T, slope)
            read = _Read(result_gradient, key, weight.view(1, -1, 1), slope.view(1, -1), pull.view(1, -1, 1))
            before = _part(arrived_rows, part)
            read.add_gradient(before, 0, value, out=row_gradient[part])
            scalar_gradient[0, part] = delta
            scalar_gradient[1, part] = excess.neg_().sigmoid_()
        return gradient, scalar_gradient, row_gradient.view(partial.shape), None, key_gradient


class _Read(NamedTuple):
    """What one reader gives back to the sources, for one chunk of tokens.

    result: gradient of the read's result, `[tokens, hidden]`. Per source and token: weights in the sum, slopes (the
    gradient of the logit over the source's RMS), pulls (what the RMS itself gives back, per unit of the source).
    """

    result: Tensor
    key: Tensor
    weights: Tensor
    slopes: Tensor
    pulls: Tensor

    def add_gradient(self, before: Tensor | None, i: int, value: Tensor, out: Tensor) -> Tensor:
        """`out = before + weight * result + slope * key + pull * value` for source `i`, rounded to `out`'s dtype."""
        total = out if out.dtype == value.dtype else torch.empty_like(value)
        if before is None:
            torch.mul(self.result, self.weights[i], out=total)
        else:
            torch.addcmul(before.to(value.dtype), self.result, self.weights[i], out=total)
        total.addr_(self.slopes[i], self.key).addcmul_(value, self.pulls[i])
        # Rounded at every reader: the sum of several must not depend on whether a stage ends between them.
        return out if out is total else out.copy_(total)


def _defined(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _part(rows: Tensor | None, part: slice) -> Tensor | None:
    return None if rows is None else rows[part]


def _row_dot(a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    return torch.mul(a, b, out=scratch[: len(a)]).sum(-1)


def row_scratch(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one chunk: made once for all of them, for fresh pages cost more than the arithmetic on them."""
    return torch.empty_like(rows[next(chunks(rows), slice(0))], dtype=dtype)


def chunks(rows: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of `[tokens, hidden]`, a cacheful each; a function of its shape and device alone."""
    size = max(1, CHUNK_ELEMENTS.get(rows.device.type, CHUNK_ELEMENTS_ELSEWHERE) // rows.shape[1])
    return (slice(begin, begin + size) for begin in range(0, len(rows), size))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _split(tensors: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    ends = list(accumulate(sizes))
    return [tensors[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
