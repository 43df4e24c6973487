"""How a GGUF names the tensors of a LLaMA-family model."""

from __future__ import annotations

WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of `layout.expected`."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    _, _, layer, *part, _ = name.split(".")
    return f"blk.{layer}.{IN_A_LAYER['.'.join(part)]}.weight"
