"""Perplexity against two oracles, and the shape of speed measurements and samples."""

import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from plprune import timing
from plprune.data import data_hash
from plprune.errors import ConfigError, DataError, PlpruneError
from plprune.evaluate import Windows, greedy_samples, perplexity, speed, windows_from_source
from plprune.load import load_tokenizer
from plprune.text import text_hash
from tiny_tokenizer import tiny_tokenizer

WORDS = 196


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def tiny(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # far from uniform: a wrong shift or weight must show
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, WORDS, (5, 12), generator=torch.Generator().manual_seed(1))


def by_hand(model: nn.Module, ids_NT: torch.Tensor) -> float:
    """The definition in float64: mean over windows of means over T - 1 predictions."""
    model = model.double().eval()
    means = []
    with torch.no_grad():
        for window in ids_NT:
            logp = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
            means.append(sum(-logp[t, window[t + 1]] for t in range(len(window) - 1)).item() / 11)
    return math.exp(sum(means) / len(means))


def test_perplexity_is_its_definition(ids: torch.Tensor):
    expected = by_hand(tiny(), ids)
    assert expected > 1.5 * WORDS  # the windows are noise: far off, and sensitive
    for batch_size in (1, 2, 5, 9):
        result = perplexity(tiny(), ids, batch_size=batch_size)
        assert result.perplexity == pytest.approx(expected, rel=1e-4)
        assert len(result.nll_N) == 5
    # Negative control: other windows, another number.
    assert perplexity(tiny(), ids.flip(1)).perplexity != pytest.approx(expected, rel=1e-2)


def test_perplexity_equals_torchmetrics(ids: torch.Tensor):
    from torchmetrics.text import Perplexity

    model, metric = tiny().eval(), Perplexity()
    with torch.no_grad():
        metric.update(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    assert perplexity(model, ids).perplexity == pytest.approx(metric.compute().item(), rel=1e-5)


def test_windows_count_equally(ids: torch.Tensor):
    whole = perplexity(tiny(), ids)
    parts = [perplexity(tiny(), ids[i : i + 1]).mean_nll for i in range(5)]
    assert whole.mean_nll == pytest.approx(sum(parts) / 5, rel=1e-6)
    assert whole.nll_N == pytest.approx(parts, rel=1e-6)


def test_the_protocol_says_what_was_measured(ids: torch.Tensor):
    windows = Windows(input_ids=ids, source="somewhere", text_sha256="abc")
    result = perplexity(tiny().bfloat16(), windows)
    block = json.loads(json.dumps(result.to_dict()))
    assert block["protocol"] == {
        "source": "somewhere",
        "text_sha256": "abc",
        "token_sha256": data_hash(ids),
        "windows": 5,
        "seq_len": 12,
        "dtype": "bfloat16",
        "model_class": "LlamaForCausalLM",
    }
    assert block["perplexity"] == pytest.approx(math.exp(block["mean_nll"]))


def test_the_model_is_left_as_it_was(ids: torch.Tensor):
    model = tiny(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    grown = [p.requires_grad for p in model.parameters()]
    one, two = (perplexity(model, ids).perplexity for _ in range(2))
    assert one == two  # no dropout
    assert [module.training for module in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == grown
    model(input_ids=ids, labels=ids).loss.backward()  # no inference tensors left behind
    with pytest.raises(PlpruneError):
        perplexity(broken(model), ids)
    assert [module.training for module in model.modules()] == before


def broken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    return model


def test_a_loss_that_is_not_finite_is_an_error(ids: torch.Tensor):
    with pytest.raises(PlpruneError, match="not finite: given nan in window 0; fix: check the"):
        perplexity(broken(tiny()), ids)


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (4,)])
def test_no_windows_is_an_error(shape: tuple[int, ...]):
    with pytest.raises(DataError, match=r"given tokens of shape \["):
        perplexity(tiny(), torch.zeros(shape, dtype=torch.int64))


def test_progress_is_told(ids: torch.Tensor):
    told: list[tuple[int, int]] = []
    perplexity(tiny(), ids, batch_size=2, progress=lambda done, of: told.append((done, of)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_hopeless_model_gives_infinity_not_an_overflow():
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1e4))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.eye(3)[0].expand(1, 4, 3) * self.weight)

    assert perplexity(Sure(), torch.ones(1, 4).long()).perplexity == math.inf


def test_windows_come_from_the_start_of_the_text(tokenizer: Any, tmp_path: Path):
    path = tmp_path / "w.txt"
    path.write_text("abcdefghij\n" * 3)
    windows = windows_from_source(str(path), tokenizer, 4, 2, rows="plain")
    assert tokenizer.batch_decode(windows.input_ids) == ["abcd", "efgh"]
    assert windows.text_sha256 == text_hash(["abcdefghij\n" * 3])
    for count in (None, 99):  # at most what there is, as the referee does
        assert len(windows_from_source(str(path), tokenizer, 4, count, rows="plain").input_ids) == 8
    joined = windows_from_source(str(path), tokenizer, 4, None)
    assert len(joined.input_ids) == (33 + 4) // 4
    with pytest.raises(DataError, match="too few tokens for one block: given 33 tokens"):
        windows_from_source(str(path), tokenizer, 34, 1, rows="plain")
    for seq_len, count in ((1, 1), (4, 0)):
        with pytest.raises(ConfigError, match="allowed seq_len >= 2, windows >= 1 or None"):
            windows_from_source(str(path), tokenizer, seq_len, count)


# --- speed and samples -----------------------------------------------------------------------


def test_speed_measures_both_models_in_turn(monkeypatch: pytest.MonkeyPatch):
    a, b = tiny(), tiny()
    a.train()
    order: list[str] = []
    clock = [0.0]

    def watch(model: nn.Module, name: str, cost: float) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            assert not module.training
            order.append(name)
            clock[0] += cost

        model.register_forward_hook(hook, with_kwargs=True)

    watch(a, "a", 2.0)
    watch(b, "b", 0.5)
    monkeypatch.setattr(timing, "_clock", lambda device: clock[0])
    result = speed(a, b, prompt_len=20, decode_tokens=3, batch_sizes=(1, 8), rounds=3)
    assert result.prefill_ratio == {1: 4.0, 8: 4.0}
    assert result.decode_ratio == 4.0
    assert result.prefill_a == {1: (10.0,) * 3, 8: (80.0,) * 3}
    assert result.decode_b == (2.0,) * 3  # three tokens in 1.5 s; the prompt does not count
    assert "".join(order[:16]) == "abbaabba" * 1 + "abbaabba"
    assert a.training
    assert json.loads(json.dumps(result.to_dict()))["dtypes"] == ["float32", "float32"]


def test_speed_of_a_model_against_itself_is_one(monkeypatch: pytest.MonkeyPatch):
    """Every measurement takes one tick: of two sides none is measured with more in it."""
    model = tiny()
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    result = speed(model, model, prompt_len=16, decode_tokens=2, batch_sizes=(2,), rounds=5)
    assert result.prefill_ratio[2] == 1
    assert all(rate > 0 for rate in (*result.decode_a, *result.prefill_b[2]))


def test_speed_refuses_nothing_to_measure():
    with pytest.raises(ConfigError, match=r"'rounds': 0}, batch_sizes \(1, 8\)"):
        speed(tiny(), tiny(), rounds=0)
    with pytest.raises(ConfigError, match="given cpu and meta; allowed both models on one device"):
        speed(tiny(), tiny().to("meta"))


def test_samples_are_greedy_and_without_the_prompt(tokenizer: Any):
    model = tiny()
    model.generation_config.do_sample = True  # ours must win
    model.train()
    prompts = ["abc", "Hello there"]
    texts = greedy_samples(model, tokenizer, prompts, max_new_tokens=6)
    assert texts == greedy_samples(model, tokenizer, prompts, max_new_tokens=6)
    assert model.training
    model.eval()
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            for _ in range(6):
                word = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                if word == tokenizer.eos_token_id:
                    break
                ids.append(word)
        assert tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) == text
    with pytest.raises(DataError, match="a prompt gives no token: given ''"):
        greedy_samples(model, tokenizer, [""])
