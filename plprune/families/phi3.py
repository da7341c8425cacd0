"""Phi-3: fused qkv (q rows, then k, then v) and fused gate_up (gate rows, then up)."""

from types import MappingProxyType

from plprune.families.base import LLAMA_SUBLAYERS, Family, Projection

_QKV = ("q", "k", "v")
_GATE_UP = ("gate", "up")

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    attention="self_attn",
    roles=MappingProxyType(
        {
            **{role: Projection(path="self_attn.qkv_proj", parts=_QKV) for role in _QKV},
            "o": Projection(path="self_attn.o_proj"),
            **{role: Projection(path="mlp.gate_up_proj", parts=_GATE_UP) for role in _GATE_UP},
            "down": Projection(path="mlp.down_proj"),
        }
    ),
    embed="model.embed_tokens",
    counters=MappingProxyType(
        {
            "self_attn": MappingProxyType(
                {"num_key_value_groups": "rep", "num_key_value_heads": "kv_heads"}
            )
        }
    ),
    sublayers=LLAMA_SUBLAYERS,
    # The split of qkv reads config.num_attention_heads in every forward.
    config_readers=("self_attn",),
)
