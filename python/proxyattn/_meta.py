"""Fake kernels: the shapes and dtypes of every op's outputs, for torch.compile and opcheck."""

import torch
from torch.library import register_fake


def _ceil_div(numerator, denominator):
    return (numerator + denominator - 1) // denominator


def _check_devices(op, **tensors):
    """One meta tensor among real ones brings a call here, past the checks of the kernels."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise TypeError(
                f"{op}: {name} must be on the device of {first_name}, {first.device}, "
                f"got {tensor.device}"
            )


@register_fake("proxyattn::pool_heads")
def _(q, k, num_proxy_heads, stride):
    _check_devices("pool_heads", q=q, k=k)

    def pooled(x):
        return x.new_empty(x.shape[0], _ceil_div(x.shape[1], stride), num_proxy_heads, x.shape[3])

    return pooled(q), pooled(k)


@register_fake("proxyattn::score_blocks")
def _(q_proxy, k_proxy, q_len, kv_len, stride, block_size, causal, scale, with_mass):
    _check_devices("score_blocks", q_proxy=q_proxy, k_proxy=k_proxy)
    batch, _, groups, _ = q_proxy.shape
    shape = (batch, groups, _ceil_div(q_len, block_size), _ceil_div(kv_len, block_size))
    peak = q_proxy.new_empty(shape, dtype=torch.float32)
    return peak, q_proxy.new_empty(shape if with_mass else (0,), dtype=torch.float32)


@register_fake("proxyattn::estimate_budgets")
def _(q, k, gamma, block_size, causal, scale):
    _check_devices("estimate_budgets", q=q, k=k)
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.int32)


@register_fake("proxyattn::select_blocks")
def _(peak, mass, budgets, q_len, kv_len, block_size, causal, budget_mode, *settings):
    used = {"mass": mass} if budget_mode == "coverage" else {}
    _check_devices("select_blocks", peak=peak, budgets=budgets, **used)
    counts = peak.new_empty(peak.shape[0], budgets.shape[1], peak.shape[2], dtype=torch.int32)
    return peak.new_empty(peak.shape, dtype=torch.int32), counts


def _attention_outputs(q, return_lse):
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@register_fake("proxyattn::block_sparse_attention")
def _(q, k, v, indices, counts, block_size, causal, scale, return_lse):
    _check_devices("block_sparse_attention", q=q, k=k, v=v, indices=indices, counts=counts)
    return _attention_outputs(q, return_lse)


@register_fake("proxyattn::proxy_attention")
def _(q, k, v, *settings):
    _check_devices("proxy_attention", q=q, k=k, v=v)
    return _attention_outputs(q, settings[-2])
