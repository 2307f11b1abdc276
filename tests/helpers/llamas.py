"""Configs of small Llamas that several files export; `export_once` shares what it makes of them."""

from typing import Any

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
ONE_BLOCK = {**_LLAMA, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
THREE_BLOCKS = {**_LLAMA, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 99, "initializer_range": 0.5}
SIX_BLOCKS = {
    **_LLAMA, "intermediate_size": 48, "num_hidden_layers": 6, "vocab_size": 300, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# matrices large enough to be quantised, and a head that is the table of words
TIED = {
    **_LLAMA, "num_key_value_heads": 4, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip
