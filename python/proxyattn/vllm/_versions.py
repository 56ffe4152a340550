"""Whether the installed vLLM has what the backend stands on."""

from dataclasses import fields

_TRIED = "0.26.0 and 0.33.0 are those that it was written for"


def require_vllm() -> None:
    """Raises RuntimeError, with what is missing, for a vLLM that can't take the backend.

    Not ImportError, which vLLM 0.26 swallows with its text.
    """
    import vllm
    from vllm.v1.attention import backend

    missing = [
        f"CommonAttentionMetadata.{name}"
        for name in ("query_start_loc_cpu", "seq_lens_cpu_upper_bound", "block_table_tensor")
        if name not in {field.name for field in fields(backend.CommonAttentionMetadata)}
    ]
    builder = getattr(backend, "AttentionMetadataBuilder", None)
    missing += [
        f"AttentionMetadataBuilder.{name}"
        for name in ("get_cudagraph_support", "_init_reorder_batch_threshold")
        if not hasattr(builder, name)
    ]
    if missing:
        raise RuntimeError(
            f"proxyattn.vllm: vLLM must have {', '.join(missing)}, got vLLM {vllm.__version__}; "
            f"{_TRIED}"
        )
