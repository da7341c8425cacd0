"""GPT-NeoX and Pythia: qkv fused head by head, partial rotary embedding, plain MLP, biases."""

from types import MappingProxyType

from plprune.families.base import Family, Projection, Sublayer

_QKV = ("q", "k", "v")

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    attention="attention",
    roles=MappingProxyType(
        {
            **{
                role: Projection(path="attention.query_key_value", parts=_QKV, interleaved=True)
                for role in _QKV
            },
            "o": Projection(path="attention.dense"),
            "up": Projection(path="mlp.dense_h_to_4h"),
            "down": Projection(path="mlp.dense_4h_to_h"),
        }
    ),
    embed="gpt_neox.embed_in",
    head_dim="head_size",
    dims=MappingProxyType(
        {
            "heads": "num_attention_heads",
            "kv_heads": "num_attention_heads",
            "ffn": "intermediate_size",
        }
    ),
    sublayers=MappingProxyType(
        {
            "attention": Sublayer(before="input_layernorm", modules=("attention",)),
            "mlp": Sublayer(before="post_attention_layernorm", modules=("mlp",)),
        }
    ),
    # The stock class derives the head width from hidden_size / num_attention_heads.
    head_rule="fixed",
)
