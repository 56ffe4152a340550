"""Sparse prefill inside Hugging Face transformers.

    import proxyattn.hf

    proxyattn.hf.register(gamma=0.95)
    model.set_attn_implementation("proxyattn")

Long causal prompts then run sparse attention, padded and packed ones and chunks after a cached
prefix included, and in layers with sliding windows attention to all of the window; everything else
(decoding, short prompts, training) runs transformers' own SDPA attention. A long prompt that runs
dense logs one warning per model and reason to the logger ``proxyattn``, which says what would make
it sparse. :func:`record` shows what ran where.
"""

from proxyattn.hf._hook import MIN_QUERIES, MIN_SEQLEN, register
from proxyattn.hf._models import check_model, require_transformers
from proxyattn.hf._recording import Recording, SparseCall, record
from proxyattn.settings import legal_proxy_heads

require_transformers()

__all__ = [
    "MIN_QUERIES",
    "MIN_SEQLEN",
    "Recording",
    "SparseCall",
    "check_model",
    "legal_proxy_heads",
    "record",
    "register",
]
