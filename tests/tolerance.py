"""When an output counts as right.

Half-precision results: the error against float64 may be twice what plain torch makes in the same
dtype, plus one rounding unit of the output's scale. Results in fp32: the bounds that rounding error
theory gives for sums in fp32, whatever their order; the error of plain bfloat16 would hide too much
there, and that of plain fp32 is a matter of luck over few values. Infinities and NaNs sit at the
same places. Everything integer is exact, see lists.py for the one exception.
"""

import numpy as np
import torch

#: Relative error of one fp32 operation; tensor cores truncate, so it is a whole unit.
FP32_UNIT = 2.0**-23


def to_numpy(tensor):
    return tensor.detach().cpu().to(torch.float64).numpy()


def _assert_same_special_values(actual, reference, name):
    for kind, test in (("nan", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differing = np.argwhere(test(actual) != test(reference))
        assert len(differing) == 0, (
            f"{name}: {kind} at other places than the reference, {len(differing)} of them, first "
            f"at {differing[0].tolist()}: got {actual[tuple(differing[0])]}, reference "
            f"{reference[tuple(differing[0])]}"
        )


def assert_within(actual, reference, bound, name="output"):
    """`bound`, a number or an array of the output's shape, limits the absolute error."""
    actual = to_numpy(actual)
    assert actual.shape == reference.shape, (
        f"{name}: shape {actual.shape}, reference {reference.shape}"
    )
    _assert_same_special_values(actual, reference, name)
    finite = np.isfinite(reference)
    excess = np.zeros(reference.shape)
    bound = np.broadcast_to(bound, reference.shape)
    excess[finite] = np.abs(actual[finite] - reference[finite]) - bound[finite]
    if excess.size and excess.max() > 0:
        worst = np.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"{name}: {np.count_nonzero(excess > 0)} of {excess.size} values are off, worst at "
            f"{[int(i) for i in worst]}: got {actual[worst]:.9g}, reference "
            f"{reference[worst]:.9g}, allowed error {bound[worst]:.3g}"
        )


def assert_close(actual, reference, plain, name="output"):
    """The rule for half precision. `plain` is the formula in plain torch, in the same dtype."""
    assert actual.dtype == plain.dtype
    finite = np.isfinite(reference)
    bound = 0.0
    if finite.any():
        error = np.abs(to_numpy(plain)[finite] - reference[finite]).max()
        bound = 2 * error + torch.finfo(plain.dtype).eps * np.abs(reference[finite]).max()
    assert_within(actual, reference, bound, name)


def sum_error(num_terms):
    """Error of an fp32 sum relative to the sum of its terms' sizes. The worst case is num_terms
    units; rounding errors are as good as random, so a few square roots are never reached."""
    return 4 * np.sqrt(num_terms) * FP32_UNIT


def logit_error(q, k, scale=None):
    """Bound on the error of the logits scale * q . k; numpy arrays with head_dim last."""
    if q.size == 0 or k.size == 0:
        return 0.0
    longest = 1.0
    for x in (q, k):
        finite = np.where(np.isfinite(x), x, 0.0)
        longest *= np.sqrt((finite**2).sum(axis=-1).max())
    head_dim = q.shape[-1]
    return sum_error(head_dim) * longest * (head_dim**-0.5 if scale is None else scale)


def log_sum_error(log_values, logits_off, num_terms):
    """Bound on the error of log-probabilities or log-sums: that of the logits, once in the term and
    once in the sum, of the sum itself, and of a few operations on values of this size."""
    largest = np.abs(log_values[np.isfinite(log_values)]).max(initial=0.0)
    return 2 * logits_off + sum_error(num_terms) + 8 * FP32_UNIT * (1 + largest)


def fp32_attention_errors(q, k, v, lse, scale=None):
    """Bounds on the errors of attention's output and of its log-sums, all in fp32."""
    lse_error = log_sum_error(lse, logit_error(q, k, scale), k.shape[1])
    weights_error = np.expm1(lse_error) + sum_error(k.shape[1])
    return 2 * weights_error * np.abs(v).max(), lse_error


def order_error(output):
    """How far half-precision outputs of the same keys, read in another order, may lie apart: their
    weights and the outputs themselves are rounded, each by half a unit."""
    return torch.finfo(output.dtype).eps * float(output.abs().max())


def bits(tensor):
    """The tensor's bit patterns as integers, so that NaNs compare too."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(as_int[tensor.element_size()])


def assert_same_bits(first, second, name="output"):
    assert first.dtype == second.dtype and first.shape == second.shape, (
        f"{name}: {first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}"
    )
    differing = (bits(first) != bits(second)).nonzero()
    assert len(differing) == 0, (
        f"{name}: {len(differing)} of {first.numel()} values differ, first at "
        f"{differing[0].tolist()}"
    )
