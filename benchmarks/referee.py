"""Perplexity of a saved model with transformers alone: nothing of plprune is imported.

Rows of a WikiText file joined by a blank line, no special tokens, the first N windows of T tokens,
mean negative log-likelihood of the T - 1 predictions of each window, float32.

usage: python referee.py DIR --text FILE [--windows 40] [--seq-len 1024] [--trust-remote-code]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

sys.modules["plprune"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def joined_rows(text: str) -> str:
    """WikiText as the papers feed it: blank lines are empty rows, a blank line joins rows."""
    rows = ["" if not line.strip() else line + "\n" for line in text.split("\n")[:-1]]
    return "\n\n".join(rows)


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    text = joined_rows(options.text.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, trust_remote_code=options.trust_remote_code
    ).eval()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    length = options.seq_len
    losses = []
    with torch.inference_mode():
        for start in range(0, min(options.windows * length, len(ids) - length + 1), length):
            window = ids[start : start + length][None]
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    answer = {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "windows": len(losses),
        "seq_len": length,
        "dtype": "float32",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0 if math.isfinite(answer["perplexity"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
