"""Tiny random models of every family: two blocks, heads of width 8, biases and norms visible.

    model = tiny.model("qwen2-gqa")                  # float64, eval mode, always the same weights
    for name in tiny.VARIANTS: ...

Where the family allows it, query heads times head width differs from the residual width, so that
code which mixes the two up fails.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from plprune.families.base import Family, Projection

# Matrices this small are slower on more threads, up to twenty times when the cores are busy.
torch.set_num_threads(1)

HEAD_DIM, FFN, VOCAB, BLOCKS, SEED = 8, 40, 64, 2, 0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One tiny model: a family, its head counts and what its config can switch."""

    family: str
    heads: int
    kv_heads: int
    tied: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def _variant(
    family: str, heads: int, kv_heads: int, *, tied: bool = False, **extra: Any
) -> Variant:
    return Variant(family=family, heads=heads, kv_heads=kv_heads, tied=tied, extra=extra)


_WINDOW = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
}

VARIANTS: dict[str, Variant] = {
    "llama-mha": _variant("llama", 6, 6),
    "llama-gqa": _variant("llama", 6, 3),
    "llama-mqa": _variant("llama", 6, 1),
    "llama-gqa-bias": _variant("llama", 6, 2, attention_bias=True, mlp_bias=True),
    "llama-gqa-tied": _variant("llama", 6, 3, tied=True),
    "mistral-mha": _variant("mistral", 6, 6, hidden_size=32),
    "mistral-gqa-window": _variant("mistral", 6, 3, hidden_size=32, sliding_window=4),
    "mistral-mqa-tied": _variant("mistral", 6, 1, hidden_size=32, tied=True),
    "qwen2-mha": _variant("qwen2", 6, 6),
    "qwen2-gqa": _variant("qwen2", 6, 3),
    "qwen2-mqa-tied": _variant("qwen2", 6, 1, tied=True),
    "qwen3-mha-tied": _variant("qwen3", 6, 6, hidden_size=32, tied=True),
    "qwen3-gqa": _variant("qwen3", 6, 3, hidden_size=32),
    "qwen3-gqa-bias": _variant("qwen3", 8, 2, attention_bias=True),
    "gemma3-gqa-tied": _variant("gemma3_text", 6, 3, tied=True, **_WINDOW),
    "gemma3-mqa": _variant("gemma3_text", 6, 1, **_WINDOW),
    "phi3-mha": _variant("phi3", 6, 6),
    "phi3-gqa": _variant("phi3", 6, 3),
    "phi3-mqa-tied": _variant("phi3", 6, 1, tied=True),
    "opt-mha": _variant("opt", 6, 6),
    "opt-mha-tied": _variant("opt", 6, 6, tied=True, word_embed_proj_dim=24),
    "gpt_neox-mha": _variant("gpt_neox", 6, 6),
    "gpt_neox-mha-tied": _variant(
        "gpt_neox", 6, 6, tied=True, use_parallel_residual=False, attention_bias=False
    ),
}
GQA = tuple(name for name, v in VARIANTS.items() if 1 < v.kv_heads < v.heads)
FAMILIES = tuple(dict.fromkeys(variant.family for variant in VARIANTS.values()))
ONE_PER_FAMILY = (
    "llama-gqa-bias",
    "mistral-gqa-window",
    "qwen2-gqa",
    "qwen3-gqa",
    "gemma3-gqa-tied",
    "phi3-gqa",
    "opt-mha-tied",
    "gpt_neox-mha",
)
"""One variant a family, grouped where it can be."""


def config(name: str, **changes: Any) -> Any:
    """Hugging Face config of a variant; `changes` win over everything."""
    from transformers import AutoConfig

    variant = VARIANTS[name]
    values: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": variant.heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "tie_word_embeddings": variant.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **({"ffn_dim": FFN} if variant.family == "opt" else {"intermediate_size": FFN}),
    }
    if variant.family not in ("opt", "gpt_neox"):
        values |= {"num_key_value_heads": variant.kv_heads, "head_dim": HEAD_DIM}
    values |= variant.extra | changes
    if variant.family == "opt":
        values.setdefault("word_embed_proj_dim", values["hidden_size"])
        values["dropout"] = 0.0
    return AutoConfig.for_model(variant.family, **values)


def model(
    name: str = "llama-gqa", *, dtype: torch.dtype = torch.float64, seed: int = SEED, **changes: Any
) -> Any:
    """A tiny random model in eval mode.

    Args:
        name: key of `VARIANTS`.
        dtype: of its parameters.
        seed: of its parameters; the global generator is left alone.
        changes: config fields.

    Returns:
        The Hugging Face model.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        made = AutoModelForCausalLM.from_config(config(name, **changes)).eval()
    made.generation_config.pad_token_id = 0
    randomise(made, seed).to(dtype)
    for module in made.modules() if dtype == torch.float64 else ():
        if type(module).__name__ == "Gemma3RMSNorm":
            module.forward = types.MethodType(_gemma_norm, module)
    return made


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    """Gemma's norm in the dtype of its input: the stock one sums gradients in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def meta(name: str = "llama-gqa", **changes: Any) -> Any:
    """The same shapes without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(name, **changes))


@functools.cache
def llama2_7b() -> Any:
    """LLaMA2-7B on the meta device."""
    dims = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    }
    return meta("llama-mha", **dims, num_attention_heads=32, num_key_value_heads=32, head_dim=128)


def randomise(module: nn.Module, seed: int = SEED) -> Any:
    """Give every parameter random values: matrices keep the scale of their input.

    Args:
        module: any module; changed in place.
        seed: of the values, drawn in the order of the parameters.

    Returns:
        The module.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 1.0))
    return module


def tokens(batch: int = 2, length: int = 9, seed: int = SEED) -> Tensor:
    """[batch, length] token ids, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def batches(count: int = 3, batch: int = 2, length: int = 12) -> list[dict[str, Tensor]]:
    """A calibration set."""
    return [{"input_ids": tokens(batch, length, seed=number)} for number in range(count)]


# --- a model with transposed weights -------------------------------------------------------------


class MicroAttention(nn.Module):
    """Causal attention with a fused Conv1D, as in GPT-2, but of a width of its own."""

    def __init__(self, hidden: int, heads: int) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.num_heads, self.head_dim = heads, HEAD_DIM
        self.c_attn = Conv1D(3 * heads * HEAD_DIM, hidden)
        self.c_proj = Conv1D(hidden, heads * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in self.c_attn(x).split(self.num_heads * self.head_dim, dim=2)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MicroBlock(nn.Module):
    """One decoder block."""

    def __init__(self, hidden: int, heads: int) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = MicroAttention(hidden, heads)
        self.c_fc, self.c_proj = Conv1D(FFN, hidden), Conv1D(hidden, FFN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(nn.functional.gelu(self.c_fc(self.ln_2(x))))


class Micro(nn.Module):
    """A causal language model of Conv1D layers; its family is `MICRO`, which tests register."""

    def __init__(self, hidden: int = 32, heads: int = 6, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="micro", n_head=heads, n_inner=FFN)
        self.embed = nn.Embedding(VOCAB, hidden)
        self.h = nn.ModuleList(MicroBlock(hidden, heads) for _ in range(blocks))
        self.ln_f = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, VOCAB, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embed(input_ids)
        for block in self.h:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(self.ln_f(x)))


MICRO = Family(
    name="micro",
    model_types=("micro",),
    blocks="h",
    attention="attn",
    roles=MappingProxyType(
        {
            **{
                role: Projection(path="attn.c_attn", parts=("q", "k", "v"))
                for role in ("q", "k", "v")
            },
            "o": Projection(path="attn.c_proj"),
            "up": Projection(path="c_fc"),
            "down": Projection(path="c_proj"),
        }
    ),
    embed="embed",
    dims=MappingProxyType({"heads": "n_head", "kv_heads": "n_head", "ffn": "n_inner"}),
    counters=MappingProxyType({"attn": MappingProxyType({"num_heads": "heads"})}),
)


def micro(dtype: torch.dtype = torch.float64) -> Micro:
    """The Conv1D model, random, in eval mode."""
    return randomise(Micro()).to(dtype).eval()
