"""What turns an attention backend of vLLM into a sparse one: a part for each of its three classes.

They go before the classes of vLLM among the bases of a class, and leave to these all but the long
rows. vLLM's metadata is made for all rows, as ever, and carries beside it what the plan of the
step needs: layers that can't run sparse go by the former, others by the latter.
"""

from collections import Counter

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport

from proxyattn.settings import Settings
from proxyattn.varlen import proxy_attention_varlen
from proxyattn.vllm import _counts
from proxyattn.vllm._memory import hold_scratch, keys_of_a_call
from proxyattn.vllm._notices import info_once, warn_once
from proxyattn.vllm._parts import Parts, dense_part, sparse_part
from proxyattn.vllm._plan import DECODE, SPARSE, Span, count_kinds, kinds_of, make_plan
from proxyattn.vllm._refusals import refuse_cache, refuse_layer, refuse_step, say
from proxyattn.vllm._settings import ServingSettings

# Pages of 64 tokens cost next to nothing to read through, those of 16 about an eighth.
_PREFERRED_PAGE = 64


class SparseBackend:
    """Beside an ``AttentionBackend``; a subclass names the other two classes."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # a member of vLLM's enumeration in all versions

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # what a row reads depends on where its prompt is cut into steps

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        preferred = super().get_preferred_block_size(default_block_size)
        if preferred < _PREFERRED_PAGE and cls.supports_block_size(_PREFERRED_PAGE):
            return _PREFERRED_PAGE
        return preferred


class SparseBuilder:
    """Beside an ``AttentionMetadataBuilder``."""

    # A copy of the metadata with another table would carry the plan with the old one.
    supports_update_block_table = False

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
        if self.reorder_batch_threshold is None:
            # Decodes first, so that long rows are neighbours.
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._serving = ServingSettings.from_config(vllm_config.additional_config)
        self._page_size = kv_cache_spec.block_size
        self._room = keys_of_a_call(vllm_config.model_config.max_model_len)
        layers = vllm_config.compilation_config.static_forward_context
        reasons = [layers[name].impl.dense_reason for name in layer_names if name in layers]
        self._dense_layers = Counter(reason for reason in reasons if reason is not None)
        self._num_sparse_layers = reasons.count(None)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Graphs of pure decoding at most: what prefill does is decided on the host."""
        of_parent = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        of_plan = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return min(of_parent, of_plan, key=lambda support: support.value)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.proxyattn = self._parts(common_prefix_len, common_attn_metadata)
        return metadata

    def _parts(self, common_prefix_len: int, common) -> Parts | None:
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        if common.max_query_len <= 1:
            self._count({DECODE: int((starts.diff() > 0).sum())})
            return None
        bound = common.seq_lens_cpu_upper_bound
        if bound is None:
            say("lengths")
            self._count({"lengths": common.num_reqs})
            return None
        starts, keys = starts.tolist(), bound[: common.num_reqs].tolist()
        kinds = kinds_of(starts, keys, self._serving.min_seqlen, self._serving.min_queries)
        if SPARSE in kinds:
            refusal = refuse_step(common, common_prefix_len, self._page_size)
            if refusal is not None:
                say(refusal)
                kinds = [refusal if kind == SPARSE else kind for kind in kinds]
        self._count(count_kinds(kinds))
        plan = make_plan(kinds, starts, keys, self._room) if self._num_sparse_layers else None
        if plan is None:
            return None
        dense = tuple((slice(*span.tokens), self._build_dense(common, span)) for span in plan.dense)
        return Parts(tuple(sparse_part(common, span) for span in plan.sparse), dense)

    def _build_dense(self, common, span: Span):
        # Fast, since FlashAttention 3's schedule has one buffer, which that of all rows is in.
        return super().build(0, dense_part(common, span), fast_build=True)

    def _count(self, rows: dict[str, int]) -> None:
        _counts.add(rows, self._num_sparse_layers, self._dense_layers)


class SparseImpl:
    """Beside an ``AttentionImpl``.

    Attributes:
        dense_reason: why no row of this layer can run sparse, None if rows can.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra,
    ):
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )
        config = get_current_vllm_config()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        serving = ServingSettings.from_config(config.additional_config)
        self._min_queries = serving.min_queries
        self._sparse_settings = _settings_of_layer(serving, num_heads, kv_heads)
        self._arguments = self._sparse_settings.to_dict()
        self._max_model_len = config.model_config.max_model_len
        self.dense_reason = refuse_layer(
            head_size=head_size,
            dtype=config.model_config.dtype,
            device=torch.device(current_platform.device_type),
            max_model_len=self._max_model_len,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            context_parallel=self.dcp_world_size * self.pcp_world_size,
            extra=extra,
        )
        if self.dense_reason is not None:
            say(self.dense_reason)

    def fused_output_quant_supported(self, quant_key) -> bool:
        return self.dense_reason is not None and super().fused_output_quant_supported(quant_key)

    def forward(
        self,
        layer,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        parts = self._parts_of(attn_metadata, query, kv_cache, output_scale)
        if parts is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        for part in parts.sparse:
            self._attend(query, kv_cache, part, output)
        for tokens, metadata in parts.dense:
            new_keys = (x if x is None else x[tokens] for x in (key, value))
            super().forward(layer, query[tokens], *new_keys, kv_cache, metadata, output[tokens])
        return output

    def _parts_of(self, metadata, query, kv_cache, output_scale) -> Parts | None:
        if self.dense_reason is not None:
            return None
        if metadata is None:
            # vLLM measures how much memory a step takes, or steps without requests.
            if query.shape[0] >= self._min_queries:
                num_keys = keys_of_a_call(self._max_model_len)
                hold_scratch(query, self.num_kv_heads, num_keys, self._sparse_settings)
            return None
        parts = getattr(metadata, "proxyattn", None)
        if parts is None:
            return None
        reason = "fused output" if output_scale is not None else refuse_cache(kv_cache, query)
        if reason is not None:
            say(reason)
            return None
        return parts

    def _attend(self, query: Tensor, kv_cache: Tensor, part, output: Tensor) -> None:
        pages = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        # A single head may have any stride, which kernels that copy boxes of memory won't take.
        keys, values = (canonicalize_singleton_dim_strides(x) for x in pages)
        proxy_attention_varlen(
            query[part.tokens],
            keys,
            values,
            part.cu_seqlens_q,
            None,
            part.max_seqlen_q,
            part.max_seqlen_k,
            block_table=part.block_table,
            seqused_k=part.seqused_k,
            scale=self.scale,
            out=output[part.tokens],
            **self._arguments,
        )


def _settings_of_layer(serving: ServingSettings, q_heads: int, kv_heads: int) -> Settings:
    """The settings that fit a layer, which has the heads of one rank; what they are is logged."""
    settings = serving.settings.fit(q_heads, kv_heads)
    if settings is not serving.settings:
        warn_once(
            f"proxyattn: num_proxy_heads={serving.settings.num_proxy_heads} fits no layer of "
            f"{q_heads} query and {kv_heads} kv heads, as each rank has them; it uses "
            f"{settings.num_proxy_heads}"
        )
    settings = settings.resolve(q_heads, kv_heads)
    listed = ", ".join(f"{name}={value}" for name, value in settings.to_dict().items())
    info_once(
        f"proxyattn: rows of at least {serving.min_seqlen} keys and {serving.min_queries} new "
        f"tokens run sparse in layers of {q_heads} query and {kv_heads} kv heads: {listed}"
    )
    return settings
