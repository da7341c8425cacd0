"""What several processes write is what one process writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import fitting
import strategy_runs as runs
import tiny
from plprune.callbacks import ExportHF, LoRARecovery, PruneReport, SizeMonitor
from ranks import RankError
from strategy_runs import everything, on_ranks

pytestmark = pytest.mark.world_size(2)
every_strategy = pytest.mark.parametrize("name", list(runs.STRATEGIES))


def recovering(folder: Path, **lora: Any) -> list[Callback]:
    return [
        fitting.prune(),
        LoRARecovery({"r": 3}, adapter_dir=str(folder / "adapter"), **lora),
        SizeMonitor(),
        PruneReport(str(folder / "report"), prompts=[], measure_speed=False),
        ExportHF(str(folder / "model"), tokenizer="none"),
    ]


@every_strategy
def test_exports_adapters_and_reports_are_those_of_one(name: str, tmp_path: Path):
    settings = {"optimizer": "one group"}
    torch.manual_seed(0)
    runs.alone(name, callbacks=lambda: recovering(tmp_path / "one"), **settings)
    torch.manual_seed(0)  # as before the first run: adapters are drawn
    on_ranks(name, callbacks=lambda: recovering(tmp_path / "two"), **settings)
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert any("lora_B" in key for key in one)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    reports = [
        json.loads((tmp_path / n / "report" / "report.json").read_text()) for n in ("one", "two")
    ]
    assert reports[0]["sizes"] == reports[1]["sizes"]
    told = [report["protocol"]["training"] for report in reports]
    for key in ("optimizer", "scheduler", "learning_rate"):
        assert told[0][key] == told[1][key]
    assert told[0]["optimizer"][0].startswith("AdamW betas")
    curves = [torch.tensor(report["curves"][0]["value"]) for report in reports]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=1e-5)


@every_strategy
def test_adapters_of_divided_weights_load_with_peft_alone(name: str, tmp_path: Path):
    """Base and adapters written apart are, for peft, what the merged export is."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for merge in (True, False):
        callbacks = lambda: [  # noqa: E731
            fitting.prune(),
            LoRARecovery({"r": 3}, merge=merge),  # noqa: B023
            ExportHF(str(tmp_path / str(merge)), tokenizer="none"),  # noqa: B023
        ]
        torch.manual_seed(0)
        on_ranks(name, callbacks=callbacks, optimizer="one group")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "True", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "False", dtype=torch.float32).eval()
    ids = tiny.tokens()
    with torch.no_grad():
        expected, without = merged(ids).logits, base(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "False" / "adapter").eval()
        torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, expected, atol=1e-3)


@every_strategy
def test_files_are_written_without_a_complete_model_on_a_rank(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Small files: each holds a few tensors, and rank 1 keeps none."""
    from plprune import export

    plain = export._Chosen
    monkeypatch.setattr(
        export, "_Chosen", lambda **more: plain(**{**more, "max_shard_bytes": 20_000})
    )
    callbacks = lambda folder: [fitting.prune(), ExportHF(str(folder), tokenizer="none")]  # noqa: E731
    runs.alone(name, callbacks=lambda: callbacks(tmp_path / "one"))
    on_ranks(name, callbacks=lambda: callbacks(tmp_path / "two"))
    names = [
        sorted(p.name for p in (tmp_path / n).iterdir() if p.suffix == ".safetensors")
        for n in ("one", "two")
    ]
    assert names[0] == names[1]
    assert len(names[0]) > 3
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@every_strategy
def test_a_target_that_cannot_be_written_stops_all_ranks(name: str, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("x")
    callbacks = lambda: [  # noqa: E731
        fitting.prune(),
        ExportHF(str(tmp_path / "model"), tokenizer="none", overwrite=True),
    ]
    with pytest.raises(RankError) as caught:
        on_ranks(name, callbacks=callbacks)
    text = str(caught.value)
    assert "rank 0:" in text
    assert "ExportError: will not overwrite" in text
    assert "another process stopped this run: rank 0 says ExportError" in text
