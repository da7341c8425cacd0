"""What a run leaves: sizes, report, export; and what it does not: hooks, old tensors."""

import csv
import gc
import importlib.machinery
import json
import signal
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import fitting
import tiny
from fitting import User, Validated, fit, hashes, linear, prune, weights
from plprune.budget import Budget
from plprune.callbacks import ExportHF, LoRARecovery, Prune, PruneReport, SizeMonitor
from plprune.describe import describe
from plprune.errors import ExportError
from plprune.lit import measured
from plprune.lit.data import LitTokens
from plprune.lit.protocol import command_line, run_seed
from plprune.methods.transact import TransAct
from plprune.report import Report
from plprune.report_tables import tables
from plprune.schedule import OneShot
from plprune.spec import Spec
from plprune.timing import SpeedResult
from tiny_tokenizer import tiny_tokenizer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- sizes ---------------------------------------------------------------------------------------


def counted(model: Any, context: int) -> dict[str, float]:
    """Sizes from the tensors of a cut model, by other means than the engine's."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    block = {name: n for name, n in sizes.items() if ".layers." in name}
    linear = {name: n for name, n in block.items() if name.split(".")[-2] in LINEARS}
    attention = model.model.layers
    heads = [layer.self_attn.q_proj.out_features for layer in attention]
    matmul = sum(linear.values()) + model.lm_head.weight.numel()
    return {
        "params_prunable": sum(linear.values()),
        "params_blocks": sum(block.values()),
        "params_model": sum(sizes.values()),
        "params_non_embedding": sum(
            n for name, n in sizes.items() if "embed" not in name and "lm_head" not in name
        ),
        "flops_per_token": 2 * matmul + sum(4 * context * width for width in heads),
        "kv_cache_bytes_per_token": sum(
            2 * 2 * layer.self_attn.k_proj.out_features for layer in attention
        ),
    }


@pytest.mark.parametrize("commit", ["every", "last"])
def test_sizes_are_logged_and_change_at_cuts_only(commit: Any, tmp_path: Path) -> None:
    expected, module = [], User()
    dense = counted(module.net, 64)
    shadow = User()  # cut at once whatever `commit` is, so it has real tensors to count
    fit(shadow, [prune(), fitting.Probe(lambda *_: expected.append(counted(shadow.net, 64)))])
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(module, [prune(commit=commit), SizeMonitor(context=64)], logger=logger, log_every_n_steps=1)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(12))
    for row, sizes in zip(rows, expected[:-1], strict=True):  # those the step was made at
        for base in ("prunable", "blocks", "model"):
            share = sizes[f"params_{base}"] / dense[f"params_{base}"]
            assert float(row[f"plprune/params_kept_{base}"]) == pytest.approx(share, rel=1e-6)
        for name in ("params_non_embedding", "flops_per_token", "kv_cache_bytes_per_token"):
            assert float(row[f"plprune/{name}"]) == sizes[name], name
    shares = [row["plprune/params_kept_model"] for row in rows]
    assert [step for step in range(1, 12) if shares[step] != shares[step - 1]] == [2, 5, 8]
    assert shares[0] == "1.0"


def test_adapters_are_counted_apart(tmp_path: Path) -> None:
    monitor = SizeMonitor()
    fit(User(), [prune(), LoRARecovery({"r": 2}), monitor])
    assert monitor.current["adapter_params"] > 0
    assert monitor.current["params_kept_model"] < 1


# --- report and export ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny_tokenizer(folder)
    words = "the cat sat on the mat of a king " * 80
    (folder / "text.txt").write_text(words, encoding="utf-8")
    return folder


def tokens(text: Path) -> LitTokens:
    file = str(text / "text.txt")
    return LitTokens(
        train=file,
        val=file,
        tokenizer=str(text),
        seq_len=16,
        batch_size=2,
        val_windows=4,
        calibration_samples=4,
    )


def parts(folder: Path, **more: Any) -> list[Any]:
    return [
        PruneReport(str(folder / "report"), prompts=["the cat"], **more),
        ExportHF(str(folder / "model"), **more),
    ]


class Named(Validated):
    """Rows of LitTokens have labels and a vocabulary of 256."""

    def __init__(self, **more: Any) -> None:
        super().__init__(dtype=torch.float32, vocab_size=256, **more)


def test_report_numbers_are_those_of_the_tensors(text: Path, tmp_path: Path) -> None:
    from plprune.evaluate import perplexity

    module, pruner, data = Named(), prune(), tokens(text)
    dense = counted(module.net, 2048)
    before = perplexity(module.net, _windows(data)).perplexity
    fit(module, [pruner, *parts(tmp_path)], data=data, max_steps=9)
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {
        "report.html",
        "report.json",
        "report.md",
    }
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    after = counted(module.net, 2048)
    for name in ("params_prunable", "params_blocks", "params_non_embedding", "params_model"):
        assert report["sizes"][name]["dense"] == dense[name], name
        assert report["sizes"][name]["pruned"] == after[name], name
    for name in ("flops_per_token", "kv_cache_bytes_per_token"):
        assert (report["sizes"][name]["dense"], report["sizes"][name]["pruned"]) == (
            dense[name],
            after[name],
        )
    (score,) = report["perplexity"]
    assert score["dense"] == pytest.approx(before, rel=1e-6)
    assert score["recovered"] == pytest.approx(
        perplexity(module.net, data.windows()).perplexity, rel=1e-6
    )
    assert [cut["plan_hash"] for cut in report["cuts"]] == hashes(pruner)
    assert [cut["params"] for cut in report["cuts"]][-1] == after["params_model"]
    training = next(curve for curve in report["curves"] if curve["name"] == "training")
    assert training["step"] == list(range(1, 10))
    assert training["value"] == pytest.approx(module.losses)
    assert report["protocol"]["plan_hashes"] == ", ".join(hashes(pruner))
    kept = report["layers"][1]["kept"]
    assert kept["mlp"] == module.net.model.layers[1].mlp.up_proj.out_features
    assert report["samples"][0]["prompt"] == "the cat"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_checkpoint_without_a_report_has_no_dense_model_to_measure(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there when it is resumed is the pruned, trained model."""
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=6)
    more: dict[str, Any] = {"enable_checkpointing": True, "data": tokens(text), "max_steps": 9}
    fit(Named(), [prune(), saver], **more)
    (middle,) = (tmp_path / "ckpt").glob("*.ckpt")
    own, measured = PruneReport._score, []

    def noted(self: Any, *given: Any) -> Any:
        measured.append(given[-1])
        return own(self, *given)

    monkeypatch.setattr(PruneReport, "_score", noted)
    report = PruneReport(str(tmp_path / "report"), prompts=[], measure_speed=False)
    fit(Named(), [prune(), report], ckpt_path=middle, data=tokens(text), max_steps=9)
    assert measured == ["pruned perplexity"]
    written = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert written["perplexity"] == []
    assert "holds no report, so the dense model was not measured; perplex" in written["notes"][1]


def test_protocol_is_enough_to_repeat_the_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch import seed_everything

    monkeypatch.setenv("PL_GLOBAL_SEED", "none")  # comes back whatever the run sets
    seed_everything(7)
    pruner = Prune(TransAct(), fitting.BUDGET, linear(), commit=2, optimizer_state="reset")
    lora = LoRARecovery({"r": 2, "target_modules": {"q_proj", "up_proj"}})
    given = Note("seed_everything: 7\n")
    settings = {"max_steps": 9, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    fit(Named(), [pruner, lora, *parts(tmp_path), given], data=tokens(text), **settings)
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    found = report["protocol"]
    assert (found["seed"], found["data.seed"]) == (7, 0)
    assert (found["evaluation_dtype"], found["training_precision"]) == ("float32", "32-true")
    assert found["training"] == {
        "optimizer": ["AdamW betas (0.9, 0.999), eps 1e-08, weight_decay 0.05"],
        "learning_rate": [0.003],
        "scheduler": ["CosineAnnealingLR"],
        "batch_size": 2,
        "processes": 1,
        "accumulate_grad_batches": 2,
        "max_steps": 9,
        "max_epochs": -1,
        "gradient_clipping": "0.5 by norm",
    }
    pruning = found["pruning"]
    assert pruning["schedule"] == "Linear(cuts=3, begin=2, end=8, unit='step')"
    assert (pruning["commit"], pruning["optimizer_state"]) == (2, "reset")
    assert pruning["budget"] == fitting.BUDGET.to_dict()
    modules = ["q_proj", "up_proj"]
    config = {"r": 2, "target_modules": modules}
    assert found["lora"] == {"start": "fit", "merged": True, "config": config}
    assert report["config"] == given.config_yaml
    last = pruner.progressive.history[-1]["calibration"]
    pool = found["data.calibration"]["token_sha256"]
    assert found["calibration set of the last cut, sha256"] == last != pool
    assert found["calibration pool, sha256"] == pool
    # The card of the export says the same.
    structure = json.loads((tmp_path / "model" / "plprune_structure.json").read_text("utf-8"))
    assert (structure["seed"], structure["data_hash"]) == (7, last)
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert f"calibration set of the last cut, sha256: {last}" in card
    assert f"calibration pool, sha256: {pool}" in card
    assert "- seed: 7" in card


class Note(Callback):
    """Knows the configuration, like the callback of the command line."""

    def __init__(self, config_yaml: str) -> None:
        self.config_yaml = config_yaml


def test_a_run_that_nobody_seeded_has_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert run_seed() is None
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert run_seed() == 11


@pytest.mark.parametrize(
    ("argv", "module", "command"),
    [
        (["/usr/bin/plprune", "fit", "--data.train=a b"], None, "plprune fit '--data.train=a b'"),
        (["/x/plprune/quickstart.py"], "plprune.quickstart", "python -m plprune.quickstart"),
        (["/x/pkg/__main__.py", "-q"], "pkg.__main__", "python -m pkg -q"),
        (["train.py", "--epochs", "3"], None, "python train.py --epochs 3"),
        ([""], None, "Python code that is in no file"),
    ],
)
def test_the_command_can_be_typed_again(
    argv: list[str], module: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = types.ModuleType("__main__")
    main.__spec__ = None if module is None else importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert command_line(argv) == command


@pytest.mark.parametrize(
    ("attention", "widths", "cell"),
    [("kv_group", {"kv_group": 2}, None), ("query_in_group", {"query_in_group": 1}, "2 → 1")],
)
def test_cuts_show_query_heads_only_if_they_were_cut_and_per_group(
    attention: Any, widths: dict[str, int], cell: str | None
) -> None:
    budget = Budget(keep=0.7, widths=widths, multiple_of={"mlp": 4})
    pruner = prune(OneShot(), method=TransAct(attention=attention), budget=budget)
    fit(User(), [pruner], max_steps=1)
    records = measured.cut_records(pruner.progressive, None)
    header, row = tables(Report(title="t", cuts=records))["Cuts"]
    found = dict(zip(header, row, strict=True))
    assert found.get("query heads per KV group") == cell


def test_speed_pairs_state_rounds_lengths_and_promise() -> None:
    dense, now = (describe(tiny.model(intermediate_size=size)) for size in (64, 32))
    result = SpeedResult(
        prefill_ratio={8: 1.5},
        decode_ratio=1.2,
        prefill_a={8: (10.0, 20.0, 40.0)},
        prefill_b={8: (15.0, 20.0, 80.0)},
        decode_a=(10.0, 10.0, 10.0),
        decode_b=(9.0, 12.0, 13.0),
        prompt_len=128,
        decode_tokens=32,
        dtypes=("float32", "float32"),
        device="cpu",
        threads=1,
    )
    prefill, decode = measured.speed_pairs(result, dense, now)
    assert (prefill.dense, prefill.pruned, prefill.rounds) == (20.0, 30.0, (1.5, 1.0, 2.0))
    assert (prefill.prompt, prefill.decoded) == (128, None)

    def flops(spec: Spec) -> float:
        inside = sum(2 * linear.rows * linear.cols for linear in spec.linears.values())
        scores = sum(4 * 128 * block.heads * block.head_dim for block in spec.blocks)
        return 128 * (inside + scores) + 2 * spec.hidden * spec.head_rows

    assert prefill.flops_ratio == pytest.approx(flops(dense) / flops(now))
    assert decode.rounds == pytest.approx((0.9, 1.2, 1.3))
    assert (decode.prompt, decode.decoded, decode.flops_ratio) == (16, 32, None)


def _windows(data: LitTokens) -> Any:
    data.setup("fit")
    return data.windows()


def test_losses_of_accumulated_steps_are_those_of_the_step(text: Path, tmp_path: Path) -> None:
    module = Named()
    report = PruneReport(str(tmp_path / "r"), prompts=[])
    fit(module, [report], data=tokens(text), max_steps=3, accumulate_grad_batches=2)
    training = next(curve for curve in report.report.curves if curve.name == "training")
    assert list(training.step) == [1, 2, 3]
    assert list(training.value) == pytest.approx(module.losses[1::2])


def test_overwrite_replaces_what_a_run_wrote(text: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    for keep in (0.9, 0.6):
        lora = LoRARecovery({"r": 2}, adapter_dir=str(adapters), overwrite=True)
        pruner = prune(OneShot(), budget=Budget(keep=keep, multiple_of={"mlp": 1}))
        run = [pruner, lora, *parts(tmp_path, overwrite=True)]
        fit(Named(), run, data=tokens(text), max_steps=2)
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    assert config["intermediate_size"] == pruner.progressive.spec.widths()["mlp"][0]
    assert hashes(pruner)[0] in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_overwrite_spares_what_a_run_did_not_write(kind: int, text: Path, tmp_path: Path) -> None:
    lora = LoRARecovery(adapter_dir=str(tmp_path / "adapters"), overwrite=True)
    callback = [*parts(tmp_path, overwrite=True), lora][kind]
    folder = tmp_path / ("report", "model", "adapters")[kind]
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    module = Named()
    with pytest.raises(ExportError) as caught:
        fit(module, [prune(), callback], data=tokens(text))
    assert str(caught.value) == (
        f"will not overwrite what an earlier run did not write: given {folder}; allowed an empty "
        "directory or one "
        "from an earlier run; fix: choose another directory, or remove this one yourself"
    )
    assert module.losses == []
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_no_files(
    error: type[BaseException], text: Path, tmp_path: Path
) -> None:
    def stop(trainer: Trainer, _: Any) -> None:
        if trainer.global_step == 6:
            raise error("enough")

    module, pruner = Named(), prune(commit=2, source="training")
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            fit(module, [pruner, *parts(tmp_path), fitting.Probe(stop)], data=tokens(text))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == []
    assert "on_load_checkpoint" not in module.__dict__
    assert hooks(module) == len(pruner.progressive.masks)


def test_a_failing_export_leaves_no_half_a_folder(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("plprune.export._fill", fail)
    with pytest.raises(ExportError, match="the export could not be written: given disk full"):
        fit(Named(), [prune(), parts(tmp_path)[1]], data=tokens(text), max_steps=9)
    assert list(tmp_path.iterdir()) == []


# --- nothing is left -----------------------------------------------------------------------------


def hooks(module: nn.Module) -> int:
    """Forward and backward hooks on a module and everything in it."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


@pytest.mark.parametrize("source", ["fresh", "training"])
@pytest.mark.parametrize("commit", ["every", "last"])
def test_no_hook_is_left(source: Any, commit: Any) -> None:
    module = User()
    before, own = hooks(module), module.on_load_checkpoint
    fit(module, [prune(commit=commit, source=source), LoRARecovery({"r": 2}), SizeMonitor()])
    assert hooks(module) == before == 0
    assert module.on_load_checkpoint == own
    assert "on_load_checkpoint" not in module.__dict__


def test_hooks_of_the_user_stay() -> None:
    module, called = User(), []
    module.net.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: called.append(1))
    module.__dict__["on_load_checkpoint"] = mine = lambda checkpoint: None
    fit(module, [prune(commit="last")])
    assert hooks(module) == 1
    assert len(called) >= 12
    assert module.on_load_checkpoint is mine


def test_one_callback_serves_several_runs() -> None:
    pruner = prune()
    first, second = User(), User()
    fit(first, [pruner])
    one = hashes(pruner)
    fit(second, [pruner])
    assert hashes(pruner) == one
    assert first.losses == second.losses
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    # The same model again: nothing is left to cut, training goes on.
    widths = pruner.progressive.spec.widths()
    fit(second, [pruner], max_steps=4)
    assert pruner.progressive.spec.widths() == widths
    assert len(hashes(pruner)) == 3
    # A new callback cuts what is there further.
    further = prune(linear(1, 1, 1), budget=Budget(keep=0.8, multiple_of={"mlp": 1}))
    fit(second, [further], max_steps=3)
    assert further.progressive.spec.widths()["mlp"][0] < widths["mlp"][0]


def test_ten_cuts_keep_nothing_alive(tmp_path: Path) -> None:
    module = User(intermediate_size=80)
    old: list[weakref.ref[Any]] = []
    counts = []

    def look(trainer: Trainer, _: Any) -> None:
        (optimizer,) = trainer.strategy.optimizers
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in module.parameters()}
        assert set(map(id, optimizer.state)) <= held
        old.extend(weakref.ref(p) for p in module.parameters())
        if trainer.global_step in (3, 6, 9):  # a collection is slow
            gc.collect()
            alive = [ref() for ref in old]
            assert {id(p) for p in alive if p is not None} == held, "a parameter outlived its cut"
            del alive
            tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
            counts.append((len(tensors), sum(t.numel() for t in tensors)))

    pruner = prune(linear(10, 1, 10), budget=Budget(keep=0.5, multiple_of={"mlp": 1}))
    fit(module, [pruner, fitting.Probe(look)])
    assert len(set(hashes(pruner))) == 10
    assert counts[0][0] >= counts[1][0] >= counts[2][0]
    assert counts[0][1] > counts[1][1] > counts[2][1]
