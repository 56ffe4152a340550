"""Scores and needs such as the stages before select_blocks might give it, and what rows see."""

import torch
from reference.grid import num_visible

NEEDS_DTYPE = {"top_p": torch.float32, "last_block": torch.int32}
MODES = tuple(NEEDS_DTYPE)


def fp32(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_call(device, mode="top_p", q_len=700, kv_len=1500, causal=True, heads=(6, 3)):
    """(peak, mass and needs; lengths, heads, block size and causality; the settings of the mode)"""
    num_rows, num_blocks = -(-q_len // 64), -(-kv_len // 64)
    shape = (2, heads[1], num_rows, num_blocks)
    visible = [num_visible(m, q_len, kv_len, 64, causal) for m in range(num_rows)]
    hidden = torch.arange(num_blocks) >= torch.tensor(visible)[:, None]
    peak = torch.randn(shape).masked_fill(hidden, -torch.inf)
    mass = torch.rand(shape).masked_fill(hidden, 0)
    mass /= mass.sum(-1, keepdim=True)
    needs = torch.rand(2, heads[0])
    if mode == "last_block":
        needs = (1 + needs * num_blocks).int()
    tensors = [x.to(device) for x in (peak, mass, needs)]
    settings = {"budget_mode": mode, "gamma": 0.7, "min_budget": 0}
    return tensors, (q_len, kv_len, heads[0], 64, causal), settings


def visible_blocks(call, device):
    """int32 [rows]: what every row of a random_call sees."""
    q_len, kv_len, _, block_size, causal = call
    geometry = (q_len, kv_len, block_size, causal)
    rows = range(-(-q_len // block_size))
    return int32([num_visible(m, *geometry) for m in rows], device)
