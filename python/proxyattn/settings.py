"""The settings of sparse attention as one object, to keep, to hand around and to store."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from proxyattn import ops

_KINDS = {float: "a number", int: "an integer", str: "text", type(None): "None"}


def legal_proxy_heads(q_heads: int, kv_heads: int) -> list[int]:
    """The numbers of proxy heads that a layer can have, ascending: divisors of ``kv_heads``, and
    multiples of it that divide ``q_heads``."""
    return [
        heads
        for heads in range(1, q_heads + 1)
        if kv_heads % heads == 0 or (heads % kv_heads == 0 and q_heads % heads == 0)
    ]


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`proxyattn.proxy_attention`, with its defaults.

    ``None`` leaves a value to the budget mode (``gamma``, ``min_budget``) or to the layer's heads
    (``num_proxy_heads``); :meth:`resolve` says what it becomes.
    """

    gamma: float | None = None
    stride: int = 4
    pooling: str = "mean"
    block_size: int = ops.DEFAULT_BLOCK_SIZE
    num_proxy_heads: int | None = None
    budget_mode: str = "top_p"
    min_budget: int | None = None
    num_sink_blocks: int = 1
    num_local_blocks: int = 1

    @classmethod
    def paper(cls, num_proxy_heads: int = 1) -> "Settings":
        """The setting of ProxyAttn, arXiv 2509.24745: first tokens, budgets of the last block.

        Args:
            num_proxy_heads: the paper takes 1 for Llama-3.1-8B, which every model allows, and 4,
                as many as there are kv heads, for Qwen2.5-7B-1M.
        """
        return cls(
            gamma=0.95,
            stride=4,
            pooling="first",
            block_size=128,
            num_proxy_heads=num_proxy_heads,
            budget_mode="last_block",
            min_budget=2048,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Settings from names and values, as :meth:`to_dict` gives them or some of them.

        Raises:
            ValueError: for a name that is no setting, or a value that no model could use.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"Settings: names must be among {', '.join(names)}, got {name!r}")
        settings = cls(**values)
        settings.check()
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON and for ``proxyattn.hf.register(**values)``."""
        return asdict(self)

    def check(self) -> None:
        """Raises ValueError for a value that no model could use."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            kinds = get_args(hint) or (hint,)
            allowed = (*kinds, int) if float in kinds else kinds
            if isinstance(value, bool) or not isinstance(value, allowed):
                what = " or ".join(_KINDS[kind] for kind in kinds)
                raise ValueError(f"Settings: {name} must be {what}, got {value!r}")
        # The ops' own rules, asked with tensors that hold nothing.
        empty = torch.empty(0, 0, max(1, self.num_proxy_heads or 1), 64)
        self.attend(empty, empty, empty)

    def resolve(self, q_heads: int, kv_heads: int) -> "Settings":
        """The same settings with no value left open, for a layer of so many heads."""
        return replace(
            self,
            gamma=ops.DEFAULT_GAMMA[self.budget_mode] if self.gamma is None else self.gamma,
            min_budget=self.resolved_min_budget,
            num_proxy_heads=self.num_proxy_heads or ops.default_proxy_heads(q_heads, kv_heads),
        )

    def fit(self, q_heads: int, kv_heads: int) -> "Settings":
        """The same settings with the nearest ``num_proxy_heads`` that a layer of so many heads can
        have; of two as near the larger, since more proxies rank better."""
        wanted = self.num_proxy_heads
        if wanted is None:
            return self
        legal = legal_proxy_heads(q_heads, kv_heads)
        used = min(legal, key=lambda heads: (abs(heads - wanted), -heads))
        return self if used == wanted else replace(self, num_proxy_heads=used)

    @property
    def resolved_min_budget(self) -> int:
        """Tokens that every head takes at least, whether given or left to the budget mode."""
        if self.min_budget is not None:
            return self.min_budget
        return ops.DEFAULT_MIN_BUDGET[self.budget_mode]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Causal :func:`proxyattn.proxy_attention` with these settings."""
        return ops.proxy_attention(
            q, k, v, scale=scale, window=window, sink_logits=sink_logits, **asdict(self)
        )
