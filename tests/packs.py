"""Packs of random sequences for the varlen ops: the same tokens each sequence on its own, one
behind another, and in the pages of a cache. Whatever belongs to no sequence is NaN, or garbage."""

from dataclasses import dataclass

import numpy as np
import torch

#: The ops that take packs, and those of them that attend.
OPS = ("block_sparse_attention_varlen", "choose_blocks_varlen", "proxy_attention_varlen")
WITH_OUT = ("block_sparse_attention_varlen", "proxy_attention_varlen")
#: Ways to hold the pages of K and V: [P, page, heads, head_dim] each, with any strides.
CACHES = ("two", "halves", "stacked", "pairs", "heads_first")
PAGES = (16, 32, 64, 128, 256)
#: Numbers that are no page.
GARBAGE = (-(2**31), -1, 2**30, 2**31 - 1)


@dataclass
class Pack:
    lengths: list  # (q_len, kv_len) of each sequence
    sequences: list  # (q, k, v) [1, n, heads, head_dim] of each
    tensors: dict  # q, k, v
    places: dict  # what else a varlen op takes, by name

    @property
    def arguments(self):
        return {**self.tensors, **self.places}

    @property
    def estimate_arguments(self):
        return {name: value for name, value in self.arguments.items() if name != "v"}

    def tokens(self, i):
        """Where sequence i's queries are among the packed ones."""
        begin = sum(q_len for q_len, _ in self.lengths[:i])
        return slice(begin, begin + self.lengths[i][0])

    def rows(self, i, block_size):
        """Where its query blocks are among those of all sequences."""
        blocks = [-(-q_len // block_size) for q_len, _ in self.lengths]
        return slice(sum(blocks[:i]), sum(blocks[: i + 1]))

    def num_rows(self, block_size):
        return len(self.tensors["q"]) // block_size + len(self.lengths)

    def rest(self):
        """The tokens that are in no sequence."""
        return slice(sum(q_len for q_len, _ in self.lengths), len(self.tensors["q"]))


def _starts(lengths, device):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def _caches(num_pages, page, heads, head_dim, dtype, device, cache):
    """K and V full of NaN."""

    def empty(*shape):
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    if cache == "two":
        return [empty(num_pages, page, heads, head_dim) for _ in range(2)]
    if cache == "halves":
        return empty(num_pages, page, heads, 2 * head_dim).split(head_dim, dim=-1)
    if cache == "stacked":
        return empty(2, num_pages, page, heads, head_dim).unbind(0)
    if cache == "pairs":
        return empty(num_pages, 2, page, heads, head_dim).unbind(1)
    if cache == "heads_first":
        both = empty(num_pages, heads, page, 2 * head_dim).transpose(1, 2)
        return both.split(head_dim, dim=-1)
    raise ValueError(cache)


def _into_pages(rng, sequences, page, cache, slack):
    """(K, V, block_table): every sequence in pages of its own, in any order."""
    _, first_k, _ = sequences[0]
    needed = [-(-k.shape[1] // page) for _, k, _ in sequences]
    num_pages = sum(needed) + 3
    heads, head_dim = first_k.shape[2:]
    caches = _caches(num_pages, page, heads, head_dim, first_k.dtype, first_k.device, cache)
    free = rng.permutation(num_pages).tolist()
    table = rng.choice(GARBAGE, size=(len(sequences), max(needed) + slack))
    for i, (_, *keys_values) in enumerate(sequences):
        for place in range(needed[i]):
            table[i, place] = free.pop()
            for whole, tokens in zip(caches, keys_values, strict=True):
                part = tokens[0, place * page : (place + 1) * page]
                whole[table[i, place], : len(part)] = part
    return *caches, torch.from_numpy(table.astype(np.int32)).to(first_k.device)


def _packed(tensors, spare):
    """[tokens, heads, head_dim] with `spare` tokens more, in memory with room between tokens."""
    heads, head_dim = tensors[0].shape[2:]
    tokens = sum(x.shape[1] for x in tensors)
    shape = (tokens + spare, heads + 1, head_dim)
    whole = tensors[0].new_full(shape, torch.nan)[:, 1:]
    torch.cat([x[0] for x in tensors], out=whole[:tokens]) if tokens else None
    return whole


def random_pack(
    device,
    lengths,
    heads=(4, 2),
    head_dim=64,
    dtype=torch.bfloat16,
    page=None,
    cache="halves",
    spare=5,
    slack=3,
    seed=0,
):
    """Of these (q_len, kv_len). `spare` tokens more than are used, capacities `slack` times too
    large."""
    rng = np.random.default_rng(seed)

    def tokens(count, heads, spread):
        values = rng.normal(size=(1, count, heads, head_dim)) * spread
        return torch.from_numpy(values).to(dtype).to(device)

    q_heads, kv_heads = heads
    sequences = [
        (tokens(m, q_heads, 2.0), tokens(n, kv_heads, 1.0), tokens(n, kv_heads, 1.0))
        for m, n in lengths
    ]
    return pack(device, sequences, page, cache, spare, slack, seed)


def pack(device, sequences, page=None, cache="halves", spare=5, slack=3, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [(q.shape[1], k.shape[1]) for q, k, _ in sequences]
    q_lens, kv_lens = zip(*lengths, strict=True)
    places = {
        "cu_seqlens_q": _starts(q_lens, device),
        "cu_seqlens_k": None,
        "max_seqlen_q": slack * max(*q_lens, 1),
        "max_seqlen_k": slack * max(*kv_lens, 1),
    }
    tensors = {"q": _packed([q for q, _, _ in sequences], spare)}
    if page is None:
        places["cu_seqlens_k"] = _starts(kv_lens, device)
        tensors["k"] = _packed([k for _, k, _ in sequences], spare)
        tensors["v"] = _packed([v for _, _, v in sequences], spare)
    else:
        tensors["k"], tensors["v"], table = _into_pages(rng, sequences, page, cache, slack)
        places["block_table"] = table
        places["seqused_k"] = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    return Pack(lengths, sequences, tensors, places)


def random_lengths(rng, causal):
    """A few sequences: empty, tiny, around blocks and pages, behind cached prefixes, and with more
    queries than keys."""
    sizes = (0, 1, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 200, 257, 300)

    def kv_len(q_len):
        kind = rng.integers(4)
        if kind == 0:
            return q_len
        if kind == 1:
            return int(rng.choice(sizes))
        return q_len + int(rng.integers(400))

    q_lens = [int(rng.choice(sizes)) for _ in range(rng.integers(1, 7))]
    lengths = [(q_len, kv_len(q_len)) for q_len in q_lens]
    return lengths if causal else [(m, n if rng.integers(8) else 0) for m, n in lengths]


def random_lists(rng, pack, list_heads, q_heads, block_size):
    """(indices [L, R, C], counts [Hq, R]): some blocks of each sequence, garbage in all places that
    nobody may look at."""
    capacity = -(-max(n for _, n in pack.lengths) // block_size) + 1
    num_rows = pack.num_rows(block_size)
    indices = rng.choice(GARBAGE, size=(list_heads, num_rows, capacity))
    counts = rng.choice(GARBAGE, size=(q_heads, num_rows))
    for i, (_, kv_len) in enumerate(pack.lengths):
        blocks = -(-kv_len // block_size)
        for row in range(num_rows)[pack.rows(i, block_size)]:
            for ranking in indices[:, row]:
                ranking[:blocks] = rng.permutation(blocks)
            counts[:, row] = rng.integers(blocks + 1, size=q_heads)
    device = pack.tensors["q"].device
    return [torch.from_numpy(x.astype(np.int32)).to(device) for x in (indices, counts)]


def arguments_of(op, pack):
    """What the function of this name takes; lists of 4 heads in 2 groups."""
    if op == "choose_blocks_varlen":
        return pack.estimate_arguments
    if op == "proxy_attention_varlen":
        return pack.arguments
    indices, counts = random_lists(np.random.default_rng(0), pack, 2, 4, 64)
    return {**pack.arguments, "indices": indices, "counts": counts}
