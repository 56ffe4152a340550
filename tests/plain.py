"""The formulas in plain torch, in the dtype of the inputs: what the tolerance is measured by."""

import torch


def matmul(a, b):
    if a.is_cuda:
        return a @ b
    return (a.float() @ b.float()).to(a.dtype)  # what a half-precision product is, but fast on CPUs


def pool(x, num_groups, stride):
    return x[:, ::stride].unflatten(2, (num_groups, x.shape[2] // num_groups)).mean(3)


def attention(q, k, v, seen, scale=None):
    """out [B, M, Hq, D]; seen bool [B, Hq, M, N]: which keys take part."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = (matmul(q, k.transpose(2, 3)) * scale).masked_fill(~seen, -torch.inf)
    p = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    return matmul(p, v).transpose(1, 2)
