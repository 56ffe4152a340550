"""The formulas in plain torch, in the dtype of the inputs: what the tolerance is measured by."""

import torch


def matmul(a, b):
    if a.is_cuda:
        return a @ b
    return (a.float() @ b.float()).to(a.dtype)  # what a half-precision product is, but fast on CPUs


def pool(x, num_groups, stride, pooling="mean"):
    window = stride if pooling == "mean" else 1
    grouped = x.unflatten(2, (num_groups, x.shape[2] // num_groups))
    starts = range(0, x.shape[1], stride)
    return torch.stack([grouped[:, i : i + window].mean((1, 3)) for i in starts], dim=1)


def seen_keys(indices, counts, q_len, kv_len, block_size, causal):
    """bool [B, Hq, M, N]: the visible keys of the chosen blocks."""
    device = indices.device
    batch, q_heads, num_rows = counts.shape
    lists = indices.long().repeat_interleave(q_heads // indices.shape[1], dim=1)
    num_blocks = -(-kv_len // block_size)
    used = torch.arange(lists.shape[3], device=device) < counts[..., None]
    chosen = torch.zeros(batch, q_heads, num_rows, num_blocks + 1, device=device)
    chosen.scatter_(3, torch.where(used, lists, num_blocks), 1.0)  # unused entries to the end
    rows, keys = (torch.arange(n, device=device) for n in (q_len, kv_len))
    seen = chosen[:, :, rows[:, None] // block_size, keys // block_size] > 0
    return seen & (keys <= rows[:, None] + (kv_len - q_len)) if causal else seen


def attention(q, k, v, seen, scale=None):
    """out [B, M, Hq, D]; seen bool [B, Hq, M, N]: which keys take part."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = (matmul(q, k.transpose(2, 3)) * scale).masked_fill(~seen, -torch.inf)
    p = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    return matmul(p, v).transpose(1, 2)
