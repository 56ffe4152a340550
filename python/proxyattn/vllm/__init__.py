"""Sparse prefill inside vLLM, as an attention backend that vLLM loads by itself.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"proxyattn": {"gamma": 0.9}}'

Installing proxyattn registers the backend, as ``CUSTOM`` and, where vLLM knows backends by name,
as ``PROXYATTN``; it does nothing until it is chosen. It is vLLM's own FlashAttention backend, or
Triton's where that is missing, with one difference: the long prefill rows of a step read chosen
blocks of the paged cache, all rows in one call. Everything else, and whatever sparse attention
can't do, stays with vLLM's own code. :class:`ServingSettings` has the settings and says what counts
as long, :func:`counts` what ran sparse and what dense, and why.

vLLM 0.26.0 and 0.33.0 are those that the code was read against. On CPUs the backend is a slow one
that serves tests, and vLLM's own is used unless this is chosen.
"""

from proxyattn.vllm._counts import counts
from proxyattn.vllm._registration import register
from proxyattn.vllm._settings import ServingSettings

__all__ = ["ServingSettings", "counts", "register"]
