"""Sparse prefill inside Hugging Face transformers.

    import proxyattn.hf

    proxyattn.hf.register(gamma=0.95)
    model.set_attn_implementation("proxyattn")

Long causal prompts then run sparse attention, padded ones and chunks after a cached prefix
included; everything else (decoding, short prompts, sliding windows that hide keys, training) runs
transformers' own SDPA attention. A long prompt that runs dense logs one warning per model and
reason to the logger ``proxyattn``, which says what would make it sparse. :func:`record` shows what
ran where.
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
