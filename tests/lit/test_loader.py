"""The loader's order, its position in checkpoints, and the data module around it."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from plprune.errors import CheckpointError, ConfigError, DataError, ModelError
from plprune.lit.data import LitTokens
from plprune.lit.loader import RankSampler, TokenLoader, TokenRows, as_blocks
from tiny_tokenizer import tiny_tokenizer

BLOCKS, LENGTH, BATCH = 23, 4, 2  # 11 batches an epoch, one block left over


def numbered(count: int = BLOCKS) -> torch.Tensor:
    """Blocks that say which they are."""
    return torch.arange(count)[:, None].repeat(1, LENGTH)


def ids(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


# --- order -----------------------------------------------------------------------------------


def test_every_pass_is_another_epoch_with_every_block_at_most_once():
    loader = TokenLoader(numbered(), BATCH)
    first, second = ([ids(batch) for batch in loader] for _ in range(2))
    assert len(first) == len(second) == len(loader) == 11
    assert first != second
    for epoch in (first, second):
        flat = [block for batch in epoch for block in batch]
        assert len(set(flat)) == len(flat) == 22


def test_order_follows_seed_and_epoch_alone():
    def epochs(seed: int) -> list[list[int]]:
        loader = TokenLoader(numbered(), BATCH, seed=seed)
        return [[x for batch in loader for x in ids(batch)] for _ in range(2)]

    torch.manual_seed(1)
    one = epochs(0)
    torch.manual_seed(2)
    assert epochs(0) == one
    # Seeds and epochs are mixed, not added: epoch 1 of seed 0 is not epoch 0 of seed 1.
    assert epochs(1)[0] != one[1]


def test_without_shuffling_the_order_is_that_of_the_text():
    loader = TokenLoader(numbered(5), BATCH, shuffle=False)
    assert [ids(batch) for batch in loader] == [[0, 1], [2, 3]]


def test_the_global_generator_is_not_touched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(TokenLoader(numbered(), BATCH))
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_a_copy_and_there_is_no_mask_without_padding():
    batch = next(iter(TokenLoader(numbered(), BATCH)))
    assert sorted(batch) == ["input_ids", "labels"]
    assert torch.equal(batch["labels"], batch["input_ids"])
    batch["labels"][:] = -100
    assert (batch["input_ids"] >= 0).all()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world: int):
    whole = [sorted(ids(b)) for b in TokenLoader(numbered(), 12, rank=0, world_size=1)]
    ranks = [
        list(TokenLoader(numbered(), 12 // world, rank=rank, world_size=world))
        for rank in range(world)
    ]
    together = [
        sorted(x for batch in step for x in ids(batch)) for step in zip(*ranks, strict=True)
    ]
    assert together == whole


def test_lightning_sees_a_sharded_sampler_and_adds_none():
    loader = TokenLoader(numbered(), BATCH)
    assert isinstance(loader.sampler, torch.utils.data.distributed.DistributedSampler)
    rows = TokenRows(as_blocks(numbered(7)))
    shares = [
        list(RankSampler(rows, multiple=1, shuffle=False, seed=0, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert shares == [[0, 3], [1, 4], [2, 5]]


def test_less_than_one_batch_is_refused():
    with pytest.raises(DataError, match="given 3 blocks, 8 a global batch; allowed at least 8"):
        len(TokenLoader(numbered(3), 4, rank=0, world_size=2))
    with pytest.raises(ConfigError, match="batch_size out of range: given 0; allowed >= 1"):
        TokenLoader(numbered(), 0)


# --- position --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 5, 11, 12, 30])
def test_a_loaded_position_continues_the_sequence(stop: int):
    def take(loader: TokenLoader, count: int) -> list[list[int]]:
        out: list[list[int]] = []
        while len(out) < count:
            for batch in loader:
                out.append(ids(batch))
                if len(out) == count:
                    break
        return out

    whole = take(TokenLoader(numbered(), BATCH), 40)
    first = TokenLoader(numbered(), BATCH)
    seen = take(first, stop)
    state = first.state_dict()
    assert all(type(value) is int for value in state.values())
    second = TokenLoader(numbered(), BATCH)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert seen + take(second, 40 - stop) == whole


def test_a_position_is_used_once():
    loader = TokenLoader(numbered(), BATCH)
    loader.load_state_dict({**loader.state_dict(), "batch": 4})
    assert [len(list(loader)) for _ in range(2)] == [7, 11]


def test_the_end_of_an_epoch_is_the_start_of_the_next():
    loader = TokenLoader(numbered(), BATCH)
    list(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 0)
    # There, another order of blocks is no mistake: nothing of it was seen.
    other = TokenLoader(numbered(9), 3, seed=5)
    other.load_state_dict(state)
    assert other.state_dict()["epoch"] == 1


def test_a_batch_in_work_does_not_count():
    in_work, over = 1, False
    loader = TokenLoader(numbered(), BATCH, progress=lambda: (in_work, over))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    assert loader.state_dict()["batch"] == 2
    in_work = 0
    assert loader.state_dict()["batch"] == 3
    over = True  # limit_train_batches
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (1, 0)


def test_a_new_run_starts_with_epoch_0():
    loader = TokenLoader(numbered(), BATCH)
    first = [ids(batch) for batch in loader]
    loader.sampler.set_epoch(0)
    assert [ids(batch) for batch in loader] == first


@pytest.mark.parametrize(
    "other",
    [
        TokenLoader(numbered(), BATCH, seed=1),
        TokenLoader(numbered(22), BATCH),
        TokenLoader(numbered(), 4),
    ],
    ids=["seed", "blocks", "global_batch"],
)
def test_a_position_in_another_order_is_refused(other: TokenLoader):
    state = {**TokenLoader(numbered(), BATCH).state_dict(), "batch": 1}
    with pytest.raises(CheckpointError, match=r"fix: resume with the data, seed and batch_size"):
        other.load_state_dict(state)


def test_two_ranks_may_become_one_at_the_same_global_batch():
    two = TokenLoader(numbered(), 2, rank=0, world_size=2)
    next(iter(two))
    TokenLoader(numbered(), 4).load_state_dict(two.state_dict())


# --- in a run --------------------------------------------------------------------------------


class KilledError(RuntimeError):
    """Stands for the end of the process."""


class Tiny(pl.LightningModule):
    """A model that notes what it was trained on."""

    def __init__(self, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(LENGTH, 1)
        self.ask_for_steps = ask_for_steps
        self.seen: list[list[int]] = []
        self.die_in_batch: int | None = None

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.trainer.fit_loop.total_batch_idx == self.die_in_batch:
            raise KilledError
        self.seen.append(batch["input_ids"][:, 0].tolist())
        return self.layer(batch["input_ids"].float()).square().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # makes Lightning ask for the loader before it restores
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Kill(Callback):
    """Saves a checkpoint at the n-th call of a hook, then ends the run."""

    def __init__(self, hook: str, call: int, path: Path) -> None:
        self.path, self.left = path, call
        setattr(self, hook, self._strike)

    def _strike(self, trainer: pl.Trainer, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise KilledError


class SaveOnException(Callback):
    """What a requeue signal in the middle of a step amounts to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.path)


def make_trainer(*callbacks: Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **settings,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LitTokens:
    """23 training blocks and 4 windows, all different."""
    folder = tmp_path_factory.mktemp("data")
    letters = "".join(map(chr, range(33, 127)))
    (folder / "train.txt").write_text(letters[: BLOCKS * LENGTH] + "!!!")
    (folder / "val.txt").write_text(letters)
    return LitTokens(
        train=str(folder / "train.txt"),
        val=str(folder / "val.txt"),
        tokenizer=str(tiny_tokenizer(folder / "tokenizer")),
        rows="plain",
        seq_len=LENGTH,
        batch_size=BATCH,
        calibration_samples=0,
        val_windows=4,
    )


def run(
    data: LitTokens, settings: dict[str, Any], killer: Callback | None = None, **model: Any
) -> tuple[list[list[int]], int]:
    """Sequence of batches and number of steps of a run, from the killer's checkpoint if there."""
    die, ckpt = model.pop("die", None), model.pop("ckpt", None)
    settings = dict(settings)
    module = Tiny(settings.pop("ask_for_steps", False))
    module.die_in_batch = die
    trainer = make_trainer(*([] if killer is None else [killer]), **settings)
    if killer is None:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    else:
        with pytest.raises(KilledError):
            trainer.fit(module, datamodule=data)
    return module.seen, trainer.global_step


RUNS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 30, "ask_for_steps": True},
    "accumulate": {"max_epochs": 3, "accumulate_grad_batches": 3, "ask_for_steps": True},
    "accumulate_steps": {"max_steps": 10, "accumulate_grad_batches": 3},
    "limited": {"max_steps": 20, "limit_train_batches": 7},
    "validate_inside": {"max_epochs": 3, "val_check_interval": 4},
    "reload": {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
}
SOME = [("on_train_batch_end", 11), ("on_train_batch_end", 17), ("on_train_epoch_end", 1)]
ALL = [
    *SOME,
    ("on_train_batch_end", 1),
    ("on_train_batch_end", 5),
    ("on_train_batch_end", 12),
    ("on_validation_end", 1),
    ("on_validation_end", 2),
    ("on_train_epoch_end", 2),
    ("on_train_epoch_start", 2),
]
KILLS = [
    *[(kind, *kill) for kind in ("steps", "accumulate") for kill in ALL],
    *[(kind, *kill) for kind in sorted(set(RUNS) - {"steps", "accumulate"}) for kill in SOME],
    ("validate_inside", "on_validation_end", 1),
    ("limited", "on_train_batch_end", 7),
    ("limited", "on_validation_end", 1),
]
WHOLE: dict[str, tuple[list[list[int]], int]] = {}


def whole(kind: str, data: LitTokens) -> tuple[list[list[int]], int]:
    """The uninterrupted run."""
    if kind not in WHOLE:
        WHOLE[kind] = run(data, RUNS[kind])
    return WHOLE[kind]


@pytest.mark.parametrize(("kind", "hook", "call"), KILLS)
def test_a_killed_run_goes_on_with_the_next_unseen_batch(
    kind: str, hook: str, call: int, data: LitTokens, tmp_path: Path
):
    path = tmp_path / "kill.ckpt"
    before, _ = run(data, RUNS[kind], Kill(hook, call, path))
    after, steps = run(data, RUNS[kind], ckpt=path)
    expected, expected_steps = whole(kind, data)
    if hook == "on_train_epoch_start" and "max_epochs" in RUNS[kind]:
        # Resumed from there, Lightning counts one epoch without asking for a batch.
        expected = expected[: len(before + after)]
        assert len(after) == 11
    else:
        assert steps == expected_steps
    assert before + after == expected


@pytest.mark.parametrize(
    ("kind", "batch"), [("epochs", 4), ("steps", 0), ("steps", 10), ("accumulate", 11)]
)
def test_a_batch_that_was_not_finished_is_seen_again(
    kind: str, batch: int, data: LitTokens, tmp_path: Path
):
    path = tmp_path / "kill.ckpt"
    before, _ = run(data, RUNS[kind], SaveOnException(path), die=batch)
    assert len(before) == batch
    after, _ = run(data, RUNS[kind], ckpt=path)
    assert before + after == whole(kind, data)[0]


def test_a_run_killed_twice(data: LitTokens, tmp_path: Path):
    seen: list[list[int]] = []
    ckpt = None
    for number, call in enumerate((6, 9)):
        path = tmp_path / f"{number}.ckpt"
        module = Tiny()
        trainer = make_trainer(Kill("on_train_batch_end", call, path), max_epochs=3)
        with pytest.raises(KilledError):
            trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
        seen += module.seen
        ckpt = path
    assert seen + run(data, RUNS["epochs"], ckpt=ckpt)[0] == whole("epochs", data)[0]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_negative_control_without_the_position_batches_repeat(
    data: LitTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "kill.ckpt"
    before, _ = run(data, RUNS["epochs"], Kill("on_train_batch_end", 5, path))
    monkeypatch.setattr(TokenLoader, "load_state_dict", lambda self, state: None)
    after, _ = run(data, RUNS["epochs"], ckpt=path)
    assert before + after != whole("epochs", data)[0]
    assert after[:5] == before


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:You defined a `validation_step`"
)
def test_a_loader_alone_resumes_in_the_middle_of_an_epoch(tmp_path: Path):
    def fit(ckpt: Path | None, *callbacks: Callback) -> list[list[int]]:
        module = Tiny()
        loader = TokenLoader(numbered(), BATCH)
        trainer = make_trainer(*callbacks, max_epochs=2, limit_val_batches=0)
        try:
            trainer.fit(module, loader, ckpt_path=ckpt, weights_only=True)
        except KilledError:
            assert callbacks
        return module.seen

    path = tmp_path / "kill.ckpt"
    for hook, call in (("on_train_batch_end", 4), ("on_train_epoch_end", 1)):
        assert fit(None, Kill(hook, call, path)) + fit(path) == fit(None)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_lightning_can_rebuild_the_loaders(data: LitTokens):
    module = Tiny()
    make_trainer(max_epochs=2, overfit_batches=2).fit(module, datamodule=data)
    assert module.seen[:2] == module.seen[2:]
    windows = make_trainer().predict(Predicts(), datamodule=data)
    assert torch.equal(torch.cat(windows), data.windows().input_ids)


class Predicts(Tiny):
    """Returns what it is given."""

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return batch["input_ids"]


# --- data module -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 40 documents in which no 32 characters occur twice."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = ({"text": " ".join(str(n) for n in range(50 * i, 50 * i + 50))} for i in range(2, 42))
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_calibration_and_training_share_nothing_and_draws_are_fresh(tokenizer: str, text: str):
    data = LitTokens(
        train=text, tokenizer=tokenizer, seq_len=32, calibration_samples=8, batch_size=3
    )
    data.prepare_data()
    data.setup("fit")
    first, again, later = (data.calibration_batches(step) for step in (0, 0, 5))
    fixed = data.calibration_batches(5, fixed=True)

    def flat(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
        return [row for batch in batches for row in batch["input_ids"].tolist()]

    assert [len(batch["input_ids"]) for batch in first] == [3, 3, 2]
    assert flat(first) == flat(again) == flat(fixed) != flat(later)
    assert len(data.training().pool) == 32
    trained = {tuple(row) for row in data.training().blocks.tolist()}
    assert len(trained) > 200
    assert not trained & {tuple(row) for row in data.training().pool.tolist()}


def test_describe_is_plain_and_repeatable(tokenizer: str, text: str):
    def make(**other: Any) -> dict[str, Any]:
        data = LitTokens(
            train=[text],
            val=text,
            tokenizer=tokenizer,
            seq_len=32,
            calibration_samples=4,
            max_train_tokens=3200,
            val_windows=5,
            **other,
        )
        data.setup()
        return json.loads(json.dumps(data.describe()))

    one = make()
    assert one == make()
    assert one["train"]["blocks"] + one["calibration"]["pool"] == 100
    assert one["validation"]["windows"] == 5
    other = make(seed=1)
    assert other["train"]["token_sha256"] != one["train"]["token_sha256"]
    assert other["validation"] == one["validation"]


def test_calibration_of_its_own_leaves_the_training_text_alone(
    tokenizer: str, text: str, tmp_path: Path
):
    (tmp_path / "c.txt").write_text("calibrate " * 40)
    data = LitTokens(
        train=text,
        calibration=str(tmp_path / "c.txt"),
        tokenizer=tokenizer,
        seq_len=32,
        max_train_tokens=320,
        calibration_samples=10,
        calibration_seq_len=16,
    )
    assert len(data.training().blocks) == 10
    batch = data.calibration_batches(0)[0]
    assert batch["input_ids"].shape == (4, 16)
    assert set(data.loaded_tokenizer().decode(batch["input_ids"][0])) <= set("calibrte\n ")


def test_no_validation_text_means_no_loader(tokenizer: str):
    data = LitTokens(train="pydoc", tokenizer=tokenizer)
    assert data.val_dataloader() == []
    with pytest.raises(DataError, match=r"there is no validation text: fix: set `data.val`"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"seq_len": 1}, ConfigError, "seq_len out of range: given 1; allowed >= 2"),
        ({"batch_size": 0}, ConfigError, "batch_size out of range: given 0; allowed >= 1"),
        ({"val_windows": 0}, ConfigError, "val_windows out of range"),
        ({"calibration_samples": -1}, ConfigError, "calibration_samples out of range"),
        ({"calibration_seq_len": 1}, ConfigError, "calibration_seq_len out of range"),
        ({"max_train_tokens": 5}, ConfigError, "max_train_tokens out of range"),
        ({"rows": "lines"}, ConfigError, "allowed blank_joined, plain"),
        ({"train": []}, ConfigError, "no training source"),
        ({"train": "no/such/file.txt"}, DataError, "text file or folder not found"),
        ({"val": "corpus.csv"}, DataError, "text file or folder not found"),
        ({"calibration": __file__}, DataError, "unknown kind of text file"),
    ],
)
def test_bad_settings_are_refused_at_once(
    settings: dict[str, Any], kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message):
        LitTokens(**{"train": "pydoc", "tokenizer": "nowhere", **settings})


def test_what_is_missing_is_refused_before_training(tokenizer: str, text: str, tmp_path: Path):
    with pytest.raises(ModelError, match=r"no such model folder: given .*nothing"):
        LitTokens(train="pydoc", tokenizer=str(tmp_path / "nothing")).prepare_data()
    short = {"train": text, "tokenizer": tokenizer, "max_train_tokens": 512 * 8}
    with pytest.raises(DataError, match=r"128 calibration \+ 0 validation of 8 blocks"):
        LitTokens(**short).setup("fit")
    (tmp_path / "c.txt").write_text("short " * 200)
    data = LitTokens(**short, calibration=str(tmp_path / "c.txt"))
    with pytest.raises(DataError, match="the calibration text is too short: given 128 samples"):
        data.setup("fit")
    data = LitTokens(**short, calibration_samples=0)
    data.setup("fit")
    with pytest.raises(DataError, match="there is no calibration set"):
        data.calibration_batches(0)


def test_windows_that_do_not_divide_are_refused(data: LitTokens, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "_rank_and_world", lambda: (0, 3))
    with pytest.raises(DataError, match=r"4 windows on 3 .*fix: set `data.val_windows: 3`"):
        data.val_dataloader()


def test_other_data_in_the_middle_of_an_epoch_are_refused(data: LitTokens):
    data.setup("fit")
    data.train_dataloader()
    state = data.state_dict()
    assert state["position"]["batch"] == 0
    data.load_state_dict({**state, "train_sha256": "0" * 64})
    inside = {**state["position"], "batch": 1}
    with pytest.raises(CheckpointError, match="allowed 0000000000000000, as in the checkpoint"):
        data.load_state_dict({"train_sha256": "0" * 64, "position": inside})


def test_other_batches_in_the_middle_of_an_epoch_are_refused_at_once(data: LitTokens):
    """Before the run is set up, also where nobody has asked for the loader yet."""
    data.setup("fit")
    data.train_dataloader()
    state = data.state_dict()
    more = {**state["position"], "global_batch": state["position"]["global_batch"] + 1}
    data._loader = None
    data.load_state_dict({**state, "position": more})  # at the start of an epoch
    with pytest.raises(CheckpointError, match="the position in the training data cannot be rest"):
        data.load_state_dict({**state, "position": {**more, "batch": 1}})


def test_the_command_line_builds_it(tokenizer: str):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LitTokens, "data")
    names = ["--data=plprune.lit.data.LitTokens", '--data.train=["pydoc","pydoc"]']
    parsed = parser.parse_args([*names, f"--data.tokenizer={tokenizer}", "--data.val_windows=null"])
    data = parser.instantiate_classes(parsed).data
    assert data.corpus.train == ("pydoc", "pydoc")
    assert data.corpus.val_windows is None
