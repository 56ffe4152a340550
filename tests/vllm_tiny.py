"""A tiny random model served by vLLM on a CPU, in this process."""

import importlib.util
import os
from contextlib import contextmanager

import pytest
import torch

# All of it is read when vLLM is imported or makes an engine. One process, so that tests can look at
# what goes on in it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)


def missing_vllm() -> str | None:
    """Why there is no vLLM for CPUs here, or None when there is."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    from vllm.platforms import current_platform

    return None if current_platform.is_cpu() else "vLLM here is not the one for CPUs"


def require_vllm():
    """Skips the module without vLLM for CPUs, or fails where it has to be there."""
    reason = missing_vllm()
    if reason is None:
        return
    if os.environ.get("PROXYATTN_REQUIRE_VLLM", "0") not in ("", "0"):
        pytest.fail(f"PROXYATTN_REQUIRE_VLLM is set, but {reason}")
    pytest.skip(f"needs vLLM for CPUs: {reason}", allow_module_level=True)


def save_model(folder):
    """A Llama of two layers, 4 query and 2 kv heads of 64, which attends unevenly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@contextmanager
def serving(model, backend=None, settings=None, **arguments):
    """An engine, chunks of 512 tokens unless said otherwise."""
    from vllm import LLM

    llm = LLM(
        **{
            "model": model,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "distributed_executor_backend": "uni",
            "attention_backend": backend,
            "additional_config": {} if settings is None else {"proxyattn": settings},
            "max_model_len": 4096,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "enforce_eager": True,
            **arguments,
        }
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def tokens(*lengths, seed=0):
    """A prompt of random tokens for each length."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 512, (length,), generator=random).tolist() for length in lengths]


def generate(llm, prompts, max_tokens=12):
    """Of each prompt the greedy tokens and their log-probabilities."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )
    outputs = _run(llm, prompts, sampling)
    return [
        (list(output.token_ids), [_only(chosen) for chosen in output.logprobs])
        for output in (request.outputs[0] for request in outputs)
    ]


def log_probs_of(llm, prompt):
    """Of each token of the prompt but the first, its log-probability."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (request,) = _run(llm, [prompt], sampling)
    return torch.tensor(
        [
            given[token].logprob
            for given, token in zip(request.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
    )


def _run(llm, prompts, sampling):
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )


def _only(chosen):
    (logprob,) = chosen.values()
    return logprob.logprob
