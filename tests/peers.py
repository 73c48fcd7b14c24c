"""Random transformers models of every architecture: the oracle for model.py, lora.py and export.py."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 101
# query heads, key heads, head size, hidden size: GQA ratios 1, 2 and 4; head size * heads != hidden size
SHAPES = {"ratio 1": (4, 4, 16, 32), "ratio 2": (4, 2, 16, 48), "ratio 4": (8, 2, 12, 40)}
KINDS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
# Two layers of three have experts; a layer of 6 experts, of which a token meets 2.
MIXTURE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=[1])
DEFAULT = {"rope_type": "default", "rope_theta": 5e4}
# With 32 original positions and heads of 16 there are frequencies on both sides of the two borders and between them.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 5e4}


def peer(kind: str = "qwen3", tied: bool = False, shape: tuple[int, ...] = SHAPES["ratio 2"], **changes: Any) -> Any:
    """A random model whose norms are not ones, whose biases are not zeros and whose logits are of order 1 to 10."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim, hidden = shape
    values: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        eos_token_id=[3, 5] if kind == "llama" else 3,
        rope_parameters=dict(LLAMA3 if kind == "llama" else DEFAULT),
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    if kind != "qwen2":  # there it is hidden_size over num_attention_heads
        values["head_dim"] = head_dim
    if kind == "qwen3_moe":
        values |= MIXTURE
    config, model = KINDS[kind]
    hf: PreTrainedModel = model(config(**values | changes)).eval()
    for p in hf.parameters():
        if p.ndim == 1:
            p.data.uniform_(0.5, 1.5)
    return hf
