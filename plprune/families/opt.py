"""OPT: multi-head attention and a plain two-layer MLP, biases everywhere."""

from types import MappingProxyType

from plprune.families.base import Family, Projection, Sublayer

OPT = Family(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    attention="self_attn",
    roles=MappingProxyType(
        {
            "q": Projection(path="self_attn.q_proj"),
            "k": Projection(path="self_attn.k_proj"),
            "v": Projection(path="self_attn.v_proj"),
            "o": Projection(path="self_attn.out_proj"),
            "up": Projection(path="fc1"),
            "down": Projection(path="fc2"),
        }
    ),
    embed="model.decoder.embed_tokens",
    dims=MappingProxyType(
        {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "ffn": "ffn_dim"}
    ),
    counters=MappingProxyType({"self_attn": MappingProxyType({"num_heads": "heads"})}),
    sublayers=MappingProxyType(
        {
            "attention": Sublayer(before="self_attn_layer_norm", modules=("self_attn",)),
            "mlp": Sublayer(before="final_layer_norm", modules=("fc1", "fc2")),
        }
    ),
    pre_norm="do_layer_norm_before",
    # The stock class derives the head width from hidden_size / num_attention_heads.
    head_rule="fixed",
)
