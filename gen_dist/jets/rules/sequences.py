"""Sequences and segments: connectionist temporal classification, and reductions of runs of rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import NotCovered, derivatives
from gen_dist.jets.registry import for_backward, rule
from gen_dist.torch_private import Operator

LOWEST = -1e30  # in place of minus infinity, whose differences are not numbers


@rule("_ctc_loss", "_cudnn_ctc_loss")
def _ctc_loss(
    operator: Operator,
    log_probs: Any,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    *flags: bool,
    zero_infinity: bool = False,
) -> Any:
    """The forward algorithm: the log probability of all alignments, for each sequence, step by step.

    `log_probs` has the shape `(time, batch, classes)`, or `(time, classes)`.
    """
    result = operator(derivatives(log_probs)[0], targets, input_lengths, target_lengths, blank, *flags)
    x = log_probs.unsqueeze(1) if log_probs.dim() == 2 else log_probs
    device = derivatives(x)[0].device
    lengths, wanted = (torch.as_tensor(n, device=device).reshape(-1) for n in (input_lengths, target_lengths))
    states = _with_blanks(targets, wanted, blank).to(device)
    emitted = x.gather(2, states.expand(x.size(0), *states.shape))
    position = torch.arange(states.size(1), device=device)
    last = 2 * wanted[:, None]
    skips = (states != blank) & (states != states.roll(2, 1)) & (position >= 2)
    log_sum = torch.where((position < 2) & (position <= last), emitted[0], LOWEST)
    for time in range(1, x.size(0)):
        ways = [log_sum, _shifted(log_sum, 1), torch.where(skips, _shifted(log_sum, 2), LOWEST)]
        moved = torch.stack(ways).logsumexp(0) + emitted[time]
        log_sum = torch.where((time < lengths)[:, None] & (position <= last), moved, log_sum)
    ends = torch.where((position == last) | (position == last - 1), log_sum, LOWEST)
    loss = -ends.logsumexp(1)
    impossible = derivatives(loss)[0] > -LOWEST / 2
    loss = torch.where(impossible, torch.zeros_like(derivatives(loss)[0]), loss)
    value = result[0].reshape(-1)
    return torch.where(impossible, value, loss).reshape(result[0].shape), for_backward(result[1])


def _with_blanks(targets: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """Return the targets of each sequence as a row, with blanks around and between."""
    if targets.dim() == 1 and lengths.numel() > 1:  # those of all sequences, one after another
        rows = targets[: int(lengths.sum())].split(lengths.tolist())
        targets = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=blank)
    targets = targets.reshape(lengths.numel(), -1)[:, : int(lengths.max())]
    states = targets.new_full((targets.size(0), 2 * targets.size(1) + 1), blank)
    states[:, 1::2] = targets
    return states


def _shifted(x: Any, by: int) -> Any:
    return torch.nn.functional.pad(x[:, : max(x.size(1) - by, 0)], (by, 0), value=LOWEST)[:, : x.size(1)]


@rule("segment_reduce")
def _segment_reduce(
    operator: Operator,
    data: Any,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Any = None,
) -> Any:
    """As `scatter_reduce` of the rows of each segment, whose derivatives can be differentiated again."""
    value = operator(derivatives(data)[0], reduce, lengths=lengths, offsets=offsets, axis=axis, initial=initial)
    if lengths is None:
        assert offsets is not None
        lengths = offsets.diff(dim=-1)
    if lengths.dim() != 1 or axis != 0 or initial is not None:
        raise NotCovered
    segment = torch.repeat_interleave(lengths)
    index = segment.view(-1, *(1 for _ in data.shape[1:])).expand(data.shape)
    kind = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin", "prod": "prod"}[reduce]
    empty = (lengths == 0).view(-1, *(1 for _ in data.shape[1:]))
    unlike_all = torch.where(empty, value, math.nan)  # an element that equals an extremum would share its derivative
    return torch.scatter_reduce(unlike_all, 0, index, data, kind, include_self=False)
