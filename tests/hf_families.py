"""Which model families the transformers hook runs, and how: tiny random models of each, what their
layers are expected to do, and README's table of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hf_tiny import transformers

LENGTH = 200
#: Windows of this many tokens hide keys from a prompt of LENGTH.
WINDOW = 64

# What a configuration takes of these it gets: two layers, 4 heads of 64, 2 kv heads, and weights
# large enough to attend unevenly.
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # other names of the same
    "n_embd": 256,
    "n_inner": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 2048,
    "d_model": 256,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
    "ffn_dim": 128,
    "word_embed_proj_dim": 256,
    "init_std": 0.2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_NEWEST = (5, 24)  # which has all of these families


@dataclass(frozen=True)
class Family:
    """A model class, and what its layers do with a long prompt."""

    name: str  # in README
    model: str  # in transformers
    settings: dict = field(default_factory=dict)  # beside _SIZES; None leaves one of those out
    sparse: tuple[int, ...] = (0, 1)  # layers
    dense: dict[tuple[int, str], int] = field(default_factory=dict)  # calls, by (layer, reason)
    padded_reason: str | None = None  # of the dense calls of a padded prompt, where it is another
    generating: tuple[int, ...] = ()  # sparse layers of `generate`, where they are others
    some_attend: bool = False  # other layers are no attention at all
    caches: tuple[str, ...] = ("dynamic", "static")
    refused: str | None = None  # what the error says
    reference: str = "sdpa"  # the implementation that knows what it does
    config: Callable | None = None  # makes one of parts
    since: tuple[int, int] = (0, 0)  # before this release of transformers it ran otherwise

    def make(self, implementation: str) -> transformers.PreTrainedModel:
        """A model; skips where transformers is too old to have the family, or has another."""
        is_missing = not hasattr(transformers, self.model) and _RELEASE < _NEWEST
        if is_missing or self.since > _RELEASE:
            pytest.skip(f"transformers {transformers.__version__} has no {self.model} like this")
        cls = getattr(transformers, self.model)
        config = self.config() if self.config else self._config(cls.config_class)
        config._attn_implementation = implementation
        config._experts_implementation = "eager"  # the default has no float64, the reference's type
        torch.manual_seed(1)
        return cls(config).eval()

    def _config(self, cls):
        default = cls()
        sizes = {name: value for name, value in _SIZES.items() if hasattr(default, name)}
        settings = {**sizes, **self.settings}
        return cls(**{name: value for name, value in settings.items() if value is not None})

    @property
    def reads_twice(self) -> bool:
        """Whether an encoder reads the prompt, as the decoder does."""
        return self.model in ("BartForConditionalGeneration", "T5ForConditionalGeneration")

    def inputs(self, ids, attention_mask=None) -> dict:
        """The arguments of a forward pass."""
        arguments = {"input_ids": ids, "attention_mask": attention_mask}
        if self.reads_twice:
            arguments["decoder_input_ids"] = ids
            arguments["decoder_attention_mask"] = attention_mask
        return {name: value for name, value in arguments.items() if value is not None}

    def dense_calls(self, is_padded: bool) -> dict[tuple[int, str], int]:
        if not is_padded or self.padded_reason is None:
            return self.dense
        return {(layer, self.padded_reason): calls for (layer, _), calls in self.dense.items()}


def _causal_lm(*names: str, **settings) -> list[Family]:
    return [Family(name, f"{name}ForCausalLM", settings) for name in names]


def _windowed(name: str, **settings) -> Family:
    """One layer with a window, one without."""
    layers = {"sliding_window": WINDOW, "layer_types": _WINDOW_THEN_FULL}
    return Family(
        name,
        f"{name}ForCausalLM",
        {**layers, **settings},
        sparse=(1,),
        dense={(0, "window"): 1},
    )


def _with_sinks(name: str, **settings) -> Family:
    """The same with learned sinks, which SDPA does without."""
    return replace(_windowed(name, **settings), reference="eager")


def _hybrid(name: str, layer: int, caches=("dynamic",), **settings) -> Family:
    """One layer of attention, one without any."""
    return Family(
        name, f"{name}ForCausalLM", settings, sparse=(layer,), some_attend=True, caches=caches
    )


def _refused(name: str, message: str, since=(0, 0), **settings) -> Family:
    cls = f"{name}ForCausalLM"
    return Family(name, cls, settings, sparse=(), refused=message, since=since)


_WINDOW_THEN_FULL = ["sliding_attention", "full_attention"]
_FULL_THEN_LINEAR = ["full_attention", "linear_attention"]
_LATENT = {  # heads of two sizes
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
}
_DELTA = {
    "layer_types": _FULL_THEN_LINEAR,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 128, "mamba_d_state": 16, "mamba_n_groups": 1}

# ---- models of parts

_TEXT = {
    name: _SIZES[name]
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "initializer_range",
        "pad_token_id",
    )
}
_IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_ROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
_QWEN_IMAGE = {
    "depth": 1,
    "hidden_size": 64,
    "out_hidden_size": 256,
    "num_heads": 2,
    "intermediate_size": 64,
}


def _of_parts(config: str, text: dict, image: dict, **settings):
    return lambda: getattr(transformers, config)(
        text_config={**_TEXT, **text}, vision_config=image, **settings
    )


def _encoder_decoder(config: str, **settings):
    return lambda: getattr(transformers, config)(
        vocab_size=128, d_model=256, decoder_start_token_id=1, pad_token_id=0, **settings
    )


_BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 512,
    "init_std": 0.2,
}

FAMILIES = [
    *_causal_lm(
        "Llama",
        "Mistral",
        "Ministral3",
        "Mixtral",
        "Qwen2",
        "Qwen2Moe",
        "Qwen3",
        "Qwen3Moe",
        "Gemma",
        "Phi",
        "Phi3",
        "Phimoe",
        "Granite",
        "GraniteMoe",
        "Cohere",
        "Olmo",
        "Olmo2",
        "Olmoe",
        "Glm",
        "Glm4",
        "Glm4Moe",
        "GPTNeoX",
        "GPTBigCode",
        "OPT",
        "Nemotron",
        "DiffLlama",
        "Helium",
        "SmolLM3",
        "StableLm",
        "Starcoder2",
        "Persimmon",
        "BitNet",
        "MiniMaxM2",
        "Arcee",
        "Ernie4_5",
        "HunYuanDenseV1",
        "SeedOss",
        "Apertus",
        "Dots1",
    ),
    Family("GPT2", "GPT2LMHeadModel"),
    *_causal_lm("FalconH1", mamba_d_ssm=128, **{**_MAMBA, "mamba_d_head": 32}),
    Family(
        "LLaVA (text)",
        "LlavaForConditionalGeneration",
        config=_of_parts(
            "LlavaConfig",
            {"model_type": "llama"},
            {"model_type": "clip_vision_model", "projection_dim": 64, **_IMAGE},
            image_token_index=127,
        ),
    ),
    Family(
        "Qwen2.5-VL (text)",
        "Qwen2_5_VLForConditionalGeneration",
        config=_of_parts(
            "Qwen2_5_VLConfig",
            {"rope_parameters": _QWEN_ROPE},
            {**_QWEN_IMAGE, "fullatt_block_indexes": [0]},
        ),
    ),
    Family(
        "Qwen3-VL (text)",
        "Qwen3VLForConditionalGeneration",
        config=_of_parts(
            "Qwen3VLConfig",
            {"head_dim": 64, "rope_parameters": _QWEN_ROPE},
            {**_QWEN_IMAGE, "deepstack_visual_indexes": []},
        ),
    ),
    _windowed("Gemma3"),
    _with_sinks("GptOss"),
    _with_sinks("Flint"),
    _windowed("Cohere2"),
    _windowed("Olmo3"),
    _windowed("Exaone4"),
    _windowed(
        "Gemma3n",
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=32,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    Family(
        "Gemma4",
        "Gemma4ForCausalLM",
        sparse=(1, 3),
        generating=(1,),  # the last two get the last query alone
        since=_NEWEST,
        dense={(0, "window"): 1, (2, "window"): 1},
        config=lambda: transformers.Gemma4TextConfig(
            **{**_TEXT, "num_hidden_layers": 4},
            num_kv_shared_layers=2,
            layer_types=_WINDOW_THEN_FULL * 2,
            sliding_window=WINDOW,
            head_dim=64,
            global_head_dim=64,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=32,
        ),
    ),
    Family(
        "Llama4",
        "Llama4ForCausalLM",
        {
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        sparse=(1,),
        dense={(0, "mask"): 1},
    ),
    _hybrid("Qwen3Next", 0, **_DELTA),
    _hybrid("Qwen3_5", 0, **_DELTA),
    _hybrid("GraniteMoeHybrid", 1, layer_types=["mamba", "attention"], **_MAMBA),
    _hybrid(
        "Jamba",
        1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    _hybrid("Bamba", 1, attn_layer_indices=[1], **_MAMBA),
    _hybrid("MiniMax", 0, caches=(), layer_types=_FULL_THEN_LINEAR),
    _hybrid("Lfm2", 1, layer_types=["conv", "full_attention"]),
    Family(
        "BART",
        "BartForConditionalGeneration",
        dense={(0, "not causal"): 2, (1, "not causal"): 2},
        padded_reason="mask",
        caches=(),
        config=_encoder_decoder("BartConfig", **_BART),
    ),
    Family(
        "Mistral with a window",
        "MistralForCausalLM",
        {"sliding_window": WINDOW},
        sparse=(),
        dense={(0, "window"): 1, (1, "window"): 1},
    ),
    Family(
        "DeepseekV3",
        "DeepseekV3ForCausalLM",
        _LATENT,
        sparse=(),
        dense={(0, "head_dim"): 1, (1, "head_dim"): 1},
    ),
    Family(
        "Glm4MoeLite",
        "Glm4MoeLiteForCausalLM",
        _LATENT,
        sparse=(),
        dense={(0, "head_dim"): 1, (1, "head_dim"): 1},
    ),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        sparse=(),
        dense={(0, "position_bias"): 3, (1, "position_bias"): 3},
        caches=(),
        since=_NEWEST,
        config=_encoder_decoder("T5Config", d_kv=64, d_ff=128, num_layers=2, num_heads=4),
    ),
    Family(
        "PaliGemma without images",
        "PaliGemmaForConditionalGeneration",
        sparse=(),
        dense={(0, "not causal"): 1, (1, "not causal"): 1},
        caches=(),
        config=_of_parts(
            "PaliGemmaConfig",
            {"model_type": "gemma", "head_dim": 64},
            {"model_type": "siglip_vision_model", **_IMAGE},
            image_token_index=127,
            projection_dim=256,
        ),
    ),
    Family(
        "Doge",
        "DogeForCausalLM",
        sparse=(),
        dense={(0, "mask"): 1, (1, "mask"): 1},
        caches=(),
        since=_NEWEST,
    ),
    _refused("Gemma2", "capped scores"),
    _refused("VaultGemma", "capped scores"),
    _refused(
        "DeepseekV32",
        "argument indices",
        since=_NEWEST,
        index_topk=64,
        index_n_heads=2,
        index_head_dim=64,
        **_LATENT,
    ),
    _refused("Bloom", "attention code of its own"),
    _refused("Mpt", "attention code of its own"),
    _refused("XGLM", "attention code of its own"),
    _refused("TrOCR", "attention code of its own"),
]


# ---- README's table

_WORDS = {
    "window": "windows, of which all is read",
    "mask": "masks of another kind",
    "not causal": "attention that is not causal",
    "head_dim": "keys and values of two sizes",
    "position_bias": "position biases",
}


def _row(family: Family) -> tuple[str, str]:
    """What runs sparse, and why the rest doesn't."""
    if family.refused is not None:
        return "refused", family.refused
    reasons = ", ".join(dict.fromkeys(_WORDS[reason] for _, reason in family.dense))
    if not family.sparse:
        return "none", reasons
    if family.some_attend:
        return "those of attention", "recurrent and linear layers are not attention"
    return ("the others", reasons) if family.dense else ("all", "")


def readme_table() -> str:
    """Markdown: the families that are alike in one row, in the order of FAMILIES."""
    rows: dict[tuple[str, str], list[str]] = {}
    for family in FAMILIES:
        rows.setdefault(_row(family), []).append(family.name)
    lines = ["| models | sparse layers | what runs dense, or is refused for |", "|---|---|---|"]
    lines += [f"| {', '.join(names)} | {layers} | {why} |" for (layers, why), names in rows.items()]
    return "\n".join(lines) + "\n"
