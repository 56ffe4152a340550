"""Causal calls: told apart from others by their mask's arguments, and handed on without a mask.

transformers makes a mask once per forward pass and gives it to every layer. Where it would hold
nothing but causal sequences, the hook's mask function sends a *sign* in its place, an int32 tensor
(which no mask is) of four dimensions, like a mask:

- ``[0, seen, q_len, kv_len]``, empty: each row is one causal sequence of ``seen`` tokens, the
  queries being its last ones. Behind them a static cache may have room for more. Models that cut
  queries or keys cut the sign like a mask, and it stays right.
- ``[0, window, q_len, kv_len]``, empty, of int16: the same with a window, and without such room.
- ``[B or 1, kv_len, 2, 3]`` on the CPU, for padded prompts. First in its last dimension: the number
  of the sequence that a key belongs to, from 1 up; 0 is padding, and -1 what a static cache holds
  no token for. Then the window, or 0. ``torch.compile`` can't look into a mask, so there every
  prompt with a mask gets this form, if it has no window.

Neither can be broadcast to scores: a model that uses its mask itself stops at a sign, instead of
taking it for something else.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig
from transformers.masking_utils import causal_mask_function

_PADDING, FIRST_SEQUENCE, _NO_TOKEN = 0, 1, -1
_NO_WINDOW = 0
_PLAIN, _WINDOWED = torch.int32, torch.int16


class Causal(NamedTuple):
    """What a sign says."""

    q_len: int | None  # None where only the call's queries say it
    kv_len: int
    seen: int  # tokens up to the last query
    sequences: Tensor | None  # int32 [B or 1, kv_len] on the CPU; None: all one sequence
    window: int | None  # keys up to its own that a query sees; None: all of them


# ---- from the arguments of a mask to its sign


def causal_sign(
    *,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor | None = None,
    kv_offset: int | Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    config: PretrainedConfig | None = None,
    **others,
) -> Tensor | None:
    """The sign of a mask with these arguments of ``sdpa_mask``, or None if it needs the mask."""
    if q_length is None or kv_length is None or q_offset is None or q_length == 1:
        return None
    if attention_mask is not None and attention_mask.dim() != 2:
        return None
    compiling = torch.compiler.is_compiling()
    window = None
    if allow_is_causal_skip and _is_window(config, local_size) and kv_length > local_size:
        window = local_size
    # A cache that keeps a window's keys alone has lost the first ones; of no other do we know why.
    if isinstance(kv_offset, Tensor) or (kv_offset != 0 and window is None):
        return None
    if window is None and not _is_causal(
        mask_function, local_size, kv_length, allow_is_causal_skip
    ):
        # Prompts in one row, one behind another. Compiled code doesn't know whether there are any
        # and has a mask that looks for them.
        whole = attention_mask is None and q_length == kv_length and not use_vmap
        if not whole or local_size is not None:
            return None
        sequences = _packed_sequences(mask_function, batch_size, kv_length, device)
        return None if sequences is None else _sign_of(sequences)
    readable = not compiling
    if isinstance(q_offset, Tensor) and readable:
        q_offset = int(q_offset)
    seen = q_offset + q_length - kv_offset
    plain = None
    if not isinstance(seen, Tensor):
        if seen > kv_length:
            return None
        if window is None:
            plain = torch.empty((0, seen, q_length, kv_length), dtype=_PLAIN, device=device)
        elif seen == kv_length:
            plain = torch.empty((0, window, q_length, kv_length), dtype=_WINDOWED, device=device)
        if plain is not None and attention_mask is None:
            return plain
    if window is not None and not readable:
        return None
    sequences = _real_tokens(attention_mask, seen, kv_length, kv_offset)
    if readable and plain is not None and bool((sequences[:, :seen] == FIRST_SEQUENCE).all()):
        return plain
    if window is not None and not _all_side_by_side(sequences):
        return None
    return _sign_of(sequences, window)


def _sign_of(sequences: Tensor, window: int | None = None) -> Tensor:
    windows = torch.full_like(sequences, _NO_WINDOW if window is None else window)
    return torch.stack([sequences, windows, windows], dim=2)[:, :, None].expand(-1, -1, 2, -1)


def _is_window(config: PretrainedConfig | None, local_size: int | None) -> bool:
    """Whether keys are local in a sliding window. The only others that transformers masks are local
    in chunks; what a mask's formula is can't be seen in compiled code."""
    if local_size is None or getattr(config, "sliding_window", None) != local_size:
        return False
    return getattr(config, "attention_chunk_size", None) != local_size


def _all_side_by_side(sequences: Tensor) -> bool:
    """Whether no row has padding between its tokens, of which a window counts each."""
    real = (sequences == FIRST_SEQUENCE).int()
    begins = real.diff(dim=1, prepend=real.new_zeros(real.shape[0], 1)) == 1
    return bool((begins.sum(1) <= 1).all())


def _is_causal(
    mask_function: Callable | None, local_size: int | None, kv_len: int, may_skip: bool
) -> bool:
    """Whether the mask hides later tokens and, but for padding, nothing else.

    ``may_skip`` is what transformers grants a causal mask without additions. Windows and chunks
    that hold all keys hide none of them.
    """
    if not may_skip:
        return False
    return mask_function is causal_mask_function if local_size is None else kv_len <= local_size


def _real_tokens(
    attention_mask: Tensor | None, seen: int | Tensor, kv_len: int, kv_offset: int
) -> Tensor:
    if attention_mask is None:
        sequences = torch.full((1, kv_len), FIRST_SEQUENCE, dtype=torch.int32)
    else:
        # As transformers reads a mask that is too short or too long.
        given = attention_mask[:, kv_offset : kv_offset + kv_len].to("cpu", torch.int32)
        missing = kv_len - given.shape[1]
        sequences = torch.nn.functional.pad(given, (0, missing), value=_PADDING)
    if isinstance(seen, Tensor):
        seen = seen.cpu()
    return torch.where(torch.arange(kv_len) < seen, sequences, _NO_TOKEN)


_NOT_LATER, _SAME_SEQUENCE = torch.Tensor.le, torch.Tensor.__eq__
_JOINING = (
    torch.Tensor.__and__,
    torch.Tensor.__getitem__,
    torch.Tensor.new_ones,
    torch.Tensor.to,
    torch.Tensor.device.__get__,
)


class _Watch(TorchFunctionMode):
    """Tells a causal mask of packed sequences by the operations that it is made of: "not later" and
    "same sequence", looked up and joined by and. Windows subtract, blocks whose tokens all see each
    other are joined by or."""

    def __init__(self):
        super().__init__()
        self.order = self.same = self.others = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is _NOT_LATER:
            self.order = True
        elif function is _SAME_SEQUENCE:
            self.same = True
        elif function not in _JOINING:
            self.others = True
        return function(*args, **(kwargs or {}))

    @property
    def saw_packed_causal(self) -> bool:
        return self.order and self.same and not self.others


def _packed_sequences(
    mask_function: Callable, batch: int, length: int, device: torch.device | str
) -> Tensor | None:
    """Sequence numbers int32 ``[batch, length]`` of a packed causal mask, None for any other.

    Asks it of each token whether it sees the one before. A mask's formula can't be read in compiled
    code, but it can be watched at work.
    """
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(length, device=device)[None]
    later, earlier = tokens[:, 1:], tokens[:, :-1]
    watch = _Watch()
    with watch:
        joined = mask_function(rows, 0, later, earlier)
    if not watch.saw_packed_causal:
        return None
    breaks = torch.nn.functional.pad((~joined).int(), (1, 0))
    return (FIRST_SEQUENCE + breaks.cumsum(1, dtype=torch.int32)).to("cpu")


# ---- from the sign to what attention needs


def read_sign(mask: Tensor | None) -> Causal | None:
    """What the sign says, None for a mask."""
    if mask is None or mask.dtype not in (_PLAIN, _WINDOWED):
        return None
    if mask.dtype == _WINDOWED:
        _, window, q_len, kv_len = mask.shape
        return Causal(q_len, kv_len, kv_len, None, window)
    if mask.shape[0] == 0:
        _, seen, q_len, kv_len = mask.shape
        return Causal(q_len, kv_len, seen, None, None)
    sequences = mask[:, :, 0, 0].to("cpu")
    kv_len = sequences.shape[1]
    if torch.compiler.is_compiling():
        # Which can't read the numbers, takes the most that they can be, and has no windows here.
        return Causal(None, kv_len, kv_len, sequences, None)
    window = int(mask[0, 0, 0, 1])
    return Causal(
        None, kv_len, num_tokens(sequences), sequences, None if window == _NO_WINDOW else window
    )


def num_tokens(sequences: Tensor) -> int:
    """Tokens up to the last query."""
    return int((sequences[0] != _NO_TOKEN).sum())


def dense_mask(causal: Causal, q_len: int, device: torch.device) -> Tensor | None:
    """The mask that SDPA would have got: bool ``[B or 1, 1, q_len, kv_len]``, or None."""
    tokens = torch.arange(causal.kv_len, device=device)
    queries = torch.arange(q_len, device=device)
    if causal.sequences is None:
        if q_len == causal.seen and causal.window is None:
            return None
        positions = queries + (causal.seen - q_len)
        return _sees(positions[:, None], tokens, causal.window)[None, None]
    keys = causal.sequences.to(device)
    positions = queries + (keys[0] != _NO_TOKEN).sum() - q_len
    own = keys[:, positions, None]
    # A padded query sees what stands before it, as with transformers' own mask.
    same = (own == keys[:, None]) | (own == _PADDING)
    sees = _sees(positions[:, None], tokens, causal.window)
    return (sees & same & (keys > _PADDING)[:, None])[:, None]


def _sees(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    sees = keys <= positions
    return sees if window is None else sees & (keys > positions - window)
