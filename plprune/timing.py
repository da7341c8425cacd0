"""Run models without training them: evaluation mode, speed side by side, greedy samples.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plprune.errors import ConfigError, DataError

DECODE_PROMPT = 16
"""Tokens in the cache before decoding is timed."""

Pair = tuple[float, float]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """Speeds of two models measured in turn in one run; a ratio above 1 says that b is faster."""

    prefill_ratio: dict[int, float]
    """By batch size: median over rounds of b's prefill tokens/s over a's."""
    decode_ratio: float
    """Median over rounds of b's decode tokens/s over a's, batch 1."""
    prefill_a: dict[int, tuple[float, ...]]
    """By batch size: prefill tokens/s of a, one per round."""
    prefill_b: dict[int, tuple[float, ...]]
    """By batch size: prefill tokens/s of b, one per round."""
    decode_a: tuple[float, ...]
    """Decode tokens/s of a, one per round."""
    decode_b: tuple[float, ...]
    """Decode tokens/s of b, one per round."""
    prompt_len: int
    """Tokens of a prefilled prompt."""
    decode_tokens: int
    """Tokens decoded per round."""
    dtypes: tuple[str, str]
    """Number formats of the weights of a and b."""
    device: str
    """Kind of device: "cpu", "cuda"."""
    threads: int
    """CPU threads torch computed with."""

    @property
    def decode_prompt(self) -> int:
        """Tokens in the cache when the clock of decoding starts."""
        return min(DECODE_PROMPT, self.prompt_len)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def speed(
    model_a: nn.Module,
    model_b: nn.Module,
    *,
    prompt_len: int = 512,
    decode_tokens: int = 32,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 5,
    seed: int = 0,
) -> SpeedResult:
    """Measure two models side by side, interleaved, so that a busy machine hurts both alike.

    Every round measures both, and which one goes first changes with the round. Each case runs once
    beforehand without being counted.

    Args:
        model_a: base of the ratios, the dense model; a Hugging Face causal language model.
        model_b: the other, the pruned model, on the same device.
        prompt_len: tokens of a prompt. Default 512.
        decode_tokens: tokens decoded one by one, batch 1. Default 32.
        batch_sizes: of the prefill. Default 1 and 8.
        rounds: default 5.
        seed: of the random prompts. Default 0.

    Raises:
        ConfigError: a number is below 1, or the models are on different devices.
    """
    models = (model_a, model_b)
    numbers = {"prompt_len": prompt_len, "decode_tokens": decode_tokens, "rounds": rounds}
    if min([*numbers.values(), *batch_sizes]) < 1:
        raise ConfigError(
            "speed cannot be measured",
            given=f"{numbers}, batch_sizes {tuple(batch_sizes)}",
            allowed="numbers from 1",
        )
    prompt = _random_prompt(models, max(batch_sizes), prompt_len, seed)
    start = prompt[:1, :DECODE_PROMPT]
    with evaluating(model_a), evaluating(model_b):
        prefill = {
            size: _in_turn(models, partial(_prefill_seconds, prompt_BT=prompt[:size]), rounds)
            for size in batch_sizes
        }
        seconds = partial(_decode_seconds, prompt_BT=start, tokens=decode_tokens)
        decode = _in_turn(models, seconds, rounds)
    tokens = {size: size * prompt_len for size in batch_sizes}
    return SpeedResult(
        prefill_ratio={size: _ratio(pairs) for size, pairs in prefill.items()},
        decode_ratio=_ratio(decode),
        prefill_a={n: tuple(tokens[n] / a for a, _ in pairs) for n, pairs in prefill.items()},
        prefill_b={n: tuple(tokens[n] / b for _, b in pairs) for n, pairs in prefill.items()},
        decode_a=tuple(decode_tokens / a for a, _ in decode),
        decode_b=tuple(decode_tokens / b for _, b in decode),
        prompt_len=prompt_len,
        decode_tokens=decode_tokens,
        dtypes=(_dtype(model_a), _dtype(model_b)),
        device=prompt.device.type,
        threads=torch.get_num_threads(),
    )


def _embedding(model: nn.Module) -> nn.Embedding:
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _random_prompt(
    models: tuple[nn.Module, nn.Module], batch: int, length: int, seed: int
) -> Tensor:
    """Tokens Long[batch, length] that both models know, on their common device."""
    here, there = (next(model.parameters()).device for model in models)
    if here != there:
        raise ConfigError(
            "speed cannot be compared across devices",
            given=f"{here} and {there}",
            allowed="both models on one device",
        )
    words = min(_embedding(model).num_embeddings for model in models)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(words, (batch, length), generator=generator).to(here)


def _ratio(pairs: list[Pair]) -> float:
    """Median over rounds of a's seconds over b's: of b's speed over a's."""
    return statistics.median(a / b for a, b in pairs)


def _in_turn(
    models: tuple[nn.Module, nn.Module], seconds: Callable[[nn.Module], float], rounds: int
) -> list[Pair]:
    """Seconds of both models, one pair per round, after one uncounted round."""
    pairs = []
    for number in range(rounds + 1):
        a_first = number % 2 == 0
        one = seconds(models[0 if a_first else 1])
        two = seconds(models[1 if a_first else 0])
        pairs.append((one, two) if a_first else (two, one))
    return pairs[1:]


def _clock(device: torch.device) -> float:
    """Seconds, with the work queued on a GPU finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _prefill_seconds(model: nn.Module, prompt_BT: Tensor) -> float:
    """Seconds to fill the cache with prompts and predict one token each."""
    # As generation does it: logits of the last position only, where the model offers that.
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    begin = _clock(prompt_BT.device)
    model(input_ids=prompt_BT, use_cache=True, **last)
    return _clock(prompt_BT.device) - begin


def _decode_seconds(model: nn.Module, prompt_BT: Tensor, tokens: int) -> float:
    """Seconds to decode `tokens` tokens greedily after a prompt, which is not timed."""
    out = model(input_ids=prompt_BT, use_cache=True)
    begin = _clock(prompt_BT.device)
    for _ in range(tokens):
        word = out.logits[:, -1:].argmax(dim=-1)
        out = model(input_ids=word, past_key_values=out.past_key_values, use_cache=True)
    return _clock(prompt_BT.device) - begin


@torch.no_grad()
def greedy_samples(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 32
) -> list[str]:
    """Continue prompts greedily, one at a time.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer; no special token is put before a prompt.
        prompts: none empty.
        max_new_tokens: at most this many tokens each. Default 32.

    Returns:
        The continuations without their prompts and without special tokens.

    Raises:
        DataError: a prompt gives no token.
    """
    from transformers import GenerationConfig

    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    # A configuration of our own: the model's may ask for sampling.
    make_config: Any = GenerationConfig
    config = make_config(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad
    )
    generate: Any = model.generate
    device = next(model.parameters()).device
    texts = []
    with evaluating(model):
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if not ids:
                raise DataError("a prompt gives no token", given=repr(prompt))
            prompt_BT = torch.tensor([ids], device=device)
            mask_BT = torch.ones_like(prompt_BT)
            out_BT = generate(prompt_BT, attention_mask=mask_BT, generation_config=config)
            texts.append(tokenizer.decode(out_BT[0, len(ids) :], skip_special_tokens=True))
    return texts
