"""Packed sequences for the comparison: what a server may have at a time, and who attends to it."""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peers import first
from peers_inputs import ExactRows, Inputs, Shape
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NUM_SEQUENCES = 32
#: The longest over the shortest sequence, and all tokens over the longest.
RANGE, TOTAL = 64, 4


def mix_lengths(longest: int) -> list[int]:
    """32 lengths: evenly spread logarithms, bent towards the short until the sum is right."""

    def bent(power: float) -> list[int]:
        places = [i / (NUM_SEQUENCES - 1) for i in range(NUM_SEQUENCES)]
        return [max(1, round(longest * RANGE ** (place**power - 1))) for place in places]

    low, high = 0.1, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(bent(middle)) > TOTAL * longest else (low, middle)
    order = torch.randperm(NUM_SEQUENCES, generator=torch.Generator().manual_seed(5)).tolist()
    lengths = bent(high)
    return [lengths[i] for i in order]


@dataclass(frozen=True)
class Pack:
    """Sequences one behind another: ``q [T, Hq, D]``, ``k, v [T, Hkv, D]``."""

    lengths: list[int]
    shape: Shape  # of the longest
    q: Tensor
    k: Tensor
    v: Tensor

    def tokens(self, i: int) -> slice:
        begin = sum(self.lengths[:i])
        return slice(begin, begin + self.lengths[i])

    def sequence(self, i: int) -> Inputs:
        part = self.tokens(i)
        shape = replace(self.shape, length=self.lengths[i])
        return Inputs(shape, self.q[None, part], self.k[None, part], self.v[None, part])

    def starts(self) -> Tensor:
        ends = itertools.accumulate(self.lengths, initial=0)
        return torch.tensor(list(ends), dtype=torch.int32, device=self.q.device)

    def arguments(self, page: int = 0) -> dict:
        """What the varlen functions take: keys one behind another, or in pages in any order."""
        starts = self.starts()
        longest = self.shape.length
        given = {"q": self.q, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
        given |= {"k": self.k, "v": self.v, "max_seqlen_q": longest, "max_seqlen_k": longest}
        if page == 0:
            return given
        used = [-(-length // page) for length in self.lengths]
        order = torch.randperm(sum(used), generator=torch.Generator().manual_seed(6))
        table = torch.zeros((len(used), max(used)), dtype=torch.int32)
        places = []
        for i, pages in enumerate(order.split(used)):
            table[i, : len(pages)] = pages
            token = torch.arange(self.lengths[i])
            places.append(pages[token // page] * page + token % page)
        place = torch.cat(places).to(self.q.device)
        for name in "kv":
            cache = given[name].new_full((sum(used) * page, *given[name].shape[1:]), torch.nan)
            cache[place] = given[name]
            given[name] = cache.view(-1, page, *cache.shape[1:])
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)
        table = table.to(self.q.device)
        return given | {"cu_seqlens_k": None, "block_table": table, "seqused_k": lengths}

    def dense_flops(self) -> float:
        shapes = (replace(self.shape, length=length) for length in self.lengths)
        return sum(shape.dense_flops(causal=True) for shape in shapes)

    def sampled(self) -> list[int]:
        """The shortest, the median and the longest."""
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        return [order[0], order[len(order) // 2], order[-1]]


def random_pack(shape: Shape, dtype: torch.dtype, device: torch.device) -> Pack:
    lengths = mix_lengths(shape.length)
    random = torch.Generator(device).manual_seed(7)

    def heads(count: int) -> Tensor:
        size = (sum(lengths), count, shape.head_dim)
        return torch.randn(size, generator=random, dtype=dtype, device=device)

    return Pack(lengths, shape, heads(shape.q_heads), heads(shape.kv_heads), heads(shape.kv_heads))


class ExactSequences:
    """Exact attention in sampled sequences of a pack, as ``exact(inputs)`` has it of each."""

    def __init__(self, pack: Pack, exact: Callable[[Inputs], ExactRows]):
        self.parts = [(pack.tokens(i), exact(pack.sequence(i))) for i in pack.sampled()]

    def error(self, out: Tensor) -> float:
        """The largest of the sequences; ``out [T, Hq, D]``."""
        errors = [exact.error(out[None, tokens]) for tokens, exact in self.parts]
        return max(errors, key=lambda error: (error != error, error))  # NaN is the largest


# ---- dense competitors over packs


def torch_one_by_one(pack: Pack) -> Callable[[], Tensor]:
    """torch's own choice for each sequence."""

    def call() -> Tensor:
        outs = []
        for i in range(len(pack.lengths)):
            inputs = pack.sequence(i)
            heads_first = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
            out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            outs.append(out.transpose(1, 2)[0])
        return torch.cat(outs)

    return call


def flash4_packed(pack: Pack) -> Callable[[], Tensor]:
    from flash_attn.cute.interface import flash_attn_varlen_func

    # Releases differ in whether they want to know the longest.
    known = inspect.signature(flash_attn_varlen_func).parameters
    arguments = {name: value for name, value in pack.arguments().items() if name in known}
    return lambda: first(flash_attn_varlen_func(**arguments, causal=True))


def packed_builders(device: torch.device) -> dict[str, Callable[[Pack], Callable[[], Tensor]]]:
    """Dense competitors over packs: name to ``builder(pack)``."""
    if device.type == "cpu":
        return {"torch SDPA": torch_one_by_one}
    return {"FlashAttention-4": flash4_packed}
