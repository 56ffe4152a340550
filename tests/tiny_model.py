"""A tiny random model in Hugging Face format, for what needs a model but not what it knows."""


def save_tiny_model(folder, seed=0, **changes):
    """Writes a Llama of two layers, 8 query and 2 kv heads of 64, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = {
        "vocab_size": len(alphabet),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config | changes)).save_pretrained(folder)
    return folder
