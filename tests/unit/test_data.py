"""Text sources, token streams, packing, splits and calibration draws."""

import builtins
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plprune.corpus import Corpus, build_training
from plprune.data import (
    Blocks,
    calibration_batches,
    data_hash,
    mixed_seed,
    pack,
    reserve,
    split_blocks,
    tokenize,
)
from plprune.errors import DataError
from plprune.load import load_tokenizer
from plprune.text import joined_rows, read_texts, source_kind, text_hash
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


# --- text ------------------------------------------------------------------------------------

WIKI = "\n = Title = \n \n One . \u2028 Still one .\n\n\n Two .\n"


def referee_rows(text: str) -> str:
    """Word for word the independent referee's treatment of a WikiText file."""
    rows = ["" if not line.strip() else line + "\n" for line in text.split("\n")[:-1]]
    return "\n\n".join(rows)


def test_rows_are_joined_as_the_referee_does():
    assert joined_rows(WIKI) == referee_rows(WIKI)
    assert "\u2028" in joined_rows(WIKI)
    assert joined_rows("a\nb") == joined_rows("a\nb\n")  # a last line without its end counts


def test_a_txt_file_is_one_document(tmp_path: Path):
    path = tmp_path / "wiki.txt"
    path.write_text(WIKI, encoding="utf-8")
    assert read_texts(str(path)) == [joined_rows(WIKI)]
    assert read_texts(str(path), rows="plain") == [WIKI]
    assert text_hash([WIKI]) == hashlib.sha256(WIKI.encode()).hexdigest()
    assert text_hash(["a", "b"]) != text_hash(["ab"])


def test_jsonl_and_parquet_give_a_document_a_row(tmp_path: Path):
    from datasets import Dataset

    texts = ["one \u2028 line", "two"]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    Dataset.from_dict({"id": [0, 1], "body": texts}).to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "README.md").write_text("not text")
    for name in ("a.jsonl", "b.parquet"):
        assert read_texts(str(tmp_path / name), text_field="body") == texts
        with pytest.raises(DataError, match=r"no text field 'text': .* allowed fields there: body"):
            read_texts(str(tmp_path / name))
        with pytest.raises(DataError, match="a value of type int"):
            read_texts(str(tmp_path / name), text_field="id")
    assert read_texts(str(tmp_path), text_field="body") == texts * 2


def test_pydoc_is_always_there():
    texts = read_texts("pydoc")
    assert len(texts) > 50
    assert texts == read_texts("pydoc")


def broken(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: str(folder / "no.txt"), "text file or folder not found: given '.*no.txt'"),
        (lambda folder: str(folder / "no"), "text file or folder not found"),
        (lambda folder: "./data/no", "text file or folder not found"),
        (lambda folder: "no.csv", "text file or folder not found"),
        (lambda folder: "what is this?", "not a text source"),
        (broken("a.csv", b"x"), "unknown kind of text file: .* allowed an existing .txt, .jsonl"),
        (lambda folder: str(folder), "the folder holds no text file"),
        (broken("a.txt", b""), "the source holds no text: given '.*a.txt', 1 documents, all blank"),
        (broken("a.jsonl", b"\n"), "the source holds no text"),
        (broken("a.txt", b"\xff\xfe\xff"), "cannot be read: .* allowed UTF-8 text"),
        (broken("a.jsonl", b'{"text": "a"}\n{"te'), "not a line of JSON: given .* line 2"),
        (broken("a.jsonl", b"[1]"), "a row must be a JSON object: given .* line 1: list"),
        (broken("a.parquet", b"PAR1"), "the text file cannot be read"),
        (lambda folder: "nobody/nothing:test", "the hub data set cannot be loaded: .*nothing"),
    ],
)
def test_a_bad_source_is_refused(make: Callable[[Path], str], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        read_texts(make(tmp_path))


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["c4", "org/name", "org/name:test", "org/name:en-1.0:train"]
    assert {source_kind(name) for name in names} == {"hub"}
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    assert source_kind("org/name") == "folder"


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("org/name", (("org/name",), "train")),
        ("org/name:test", (("org/name",), "test")),
        ("org/name:en:valid", (("org/name", "en"), "valid")),
    ],
)
def test_a_hub_source_names_its_split(
    source: str, call: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
):
    import datasets

    calls = []

    def load(*args: str, split: str) -> Any:
        calls.append((args, split))
        return datasets.Dataset.from_dict({"text": ["hub"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_texts(source) == ["hub"]
    assert calls == [call]


def test_the_engine_needs_neither_datasets_nor_transformers(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.split(".")[0] not in ("datasets", "transformers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert read_texts("pydoc")


# --- tokens ----------------------------------------------------------------------------------


def test_tokens_are_the_text_and_nothing_else(tokenizer: Any):
    ids = tokenize(["ab", "", "c"], tokenizer)
    assert tokenizer.decode(ids) == "abc"
    assert ids.dtype == torch.int64


def test_special_tokens_only_on_request(tokenizer: Any):
    a, b = tokenizer("a")["input_ids"] + tokenizer("b")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenize(["a", "", "b"], tokenizer, eos_between=True).tolist() == [a, eos, b]
    assert tokenize(["a", "b"], tokenizer, bos=True).tolist() == [bos, a, bos, b]
    both = tokenize(["a", "b"], tokenizer, eos_between=True, bos=True)
    assert both.tolist() == [bos, a, eos, bos, b]


def test_batches_of_documents_leave_no_seam(tokenizer: Any):
    texts = [chr(33 + i % 90) * (i % 3 + 1) for i in range(200)]
    one = torch.cat([tokenize([text], tokenizer) for text in texts])
    assert torch.equal(tokenize(texts, tokenizer), one)
    assert torch.equal(tokenize(texts, tokenizer, limit=150), one[:150])


def test_no_text_and_missing_specials_are_refused(tokenizer: Any):
    with pytest.raises(DataError, match="no text to tokenise: given 2 documents, 0 not empty"):
        tokenize(["", ""], tokenizer)
    monk = type("Bare", (), {"eos_token_id": None, "bos_token_id": None})()
    with pytest.raises(DataError, match=r"no eos token: given Bare; fix: set `eos_between: false`"):
        tokenize(["a"], monk, eos_between=True)
    with pytest.raises(DataError, match="no bos token"):
        tokenize(["a"], monk, bos=True)


def test_packing_drops_or_pads_the_remainder():
    stream = torch.arange(1, 12)
    blocks = pack(stream, 4)
    assert blocks.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert blocks.attention_mask is None
    padded = pack(stream, 4, pad_last=True, pad_id=9)
    assert padded.input_ids[-1].tolist() == [9, 10, 11, 9]
    assert padded.attention_mask.tolist() == [[1] * 4, [1] * 4, [1, 1, 1, 0]]
    assert pack(torch.arange(8), 4, pad_last=True).attention_mask is None
    batch = padded.batch(torch.tensor([2, 0]))
    assert batch["labels"].tolist() == [[9, 10, 11, -100], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1] * 4]
    with pytest.raises(DataError, match="given 3 tokens, blocks of 4; allowed at least 4 tokens"):
        pack(torch.arange(3), 4)
    assert len(pack(torch.arange(3), 4, pad_last=True)) == 1


def test_the_hash_is_of_the_ids_in_reading_order():
    ids = torch.randint(0, 50_000, (3, 5))
    expected = hashlib.sha256(struct.pack("<15q", *ids.flatten().tolist())).hexdigest()
    assert data_hash(ids) == data_hash(ids.flatten()) == data_hash(ids.int()) == expected
    assert data_hash(ids.T) != expected
    # Pieces of a long stream leave no seam.
    long = torch.arange((1 << 20) + 3)
    raw = hashlib.sha256(struct.pack(f"<{len(long)}q", *long.tolist())).hexdigest()
    assert data_hash(long) == raw


# --- splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "calibration", "validation"), [(10, 3, 2), (10, 0, 0), (2, 1, 0)]
)
def test_splits_share_nothing_and_lose_nothing(count: int, calibration: int, validation: int):
    split = split_blocks(count, calibration=calibration, validation=validation, seed=3)
    parts = [split.calibration, split.validation, split.training]
    assert [len(part) for part in parts[:2]] == [calibration, validation]
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert split.training.tolist() == sorted(split.training.tolist())


def test_the_split_follows_the_seed():
    draws = [split_blocks(100, calibration=5, seed=seed).calibration.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    with_validation = split_blocks(100, calibration=5, validation=7, seed=0)
    assert with_validation.calibration.tolist() == draws[0]


@pytest.mark.parametrize(("calibration", "validation"), [(10, 0), (5, 5), (11, 0), (-1, 0)])
def test_a_split_without_training_blocks_is_refused(calibration: int, validation: int):
    with pytest.raises(DataError, match="of 10 blocks; allowed at most 9 in sum"):
        split_blocks(10, calibration=calibration, validation=validation)


@pytest.mark.parametrize("length", [3, 4, 8, 12, 7, 20])
@pytest.mark.parametrize("pool", [1, 3, 4])
def test_reserved_tokens_are_not_trained_on(length: int, pool: int):
    stream = torch.arange(203)
    blocks, sequences = reserve(stream, seq_len=8, pool=pool, pool_seq_len=length, seed=1)
    assert sequences.shape == (pool, length)
    assert blocks.shape[1] == 8
    assert not set(sequences.flatten().tolist()) & set(blocks.flatten().tolist())
    for row in [*sequences, *blocks]:  # pieces of the text, not mixtures
        assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + len(row)))
    assert blocks[:, 0].tolist() == sorted(blocks[:, 0].tolist())


def test_a_stream_too_short_to_reserve_from_is_refused():
    with pytest.raises(DataError, match=r"3 calibration \+ 0 validation of 3 blocks"):
        reserve(torch.arange(24), seq_len=8, pool=3, pool_seq_len=8)


def test_draws_are_seeded_fresh_per_step_and_without_repetition():
    pool = torch.arange(50)[:, None].repeat(1, 3)

    def draw(**kwargs: Any) -> list[int]:
        batches = calibration_batches(pool, samples=10, batch_size=4, **kwargs)
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
        assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
        return [row for batch in batches for row in batch["input_ids"][:, 0].tolist()]

    assert draw() == draw(step=0) == draw(step=9, fixed=True)
    assert len({tuple(draw(seed=seed, step=step)) for seed in (0, 1) for step in (0, 1, 2)}) == 6
    assert len(set(draw())) == 10


@pytest.mark.parametrize(("samples", "size"), [(0, 1), (6, 1), (5, 0)])
def test_a_calibration_set_that_cannot_be_drawn_is_refused(samples: int, size: int):
    with pytest.raises(DataError, match=r"from a pool of 5; allowed 1\.\.5 samples"):
        calibration_batches(torch.zeros(5, 3).long(), samples=samples, batch_size=size)


def test_seeds_are_mixed_not_added():
    seeds = {mixed_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_pool_leaves_three_quarters_to_training(tokenizer: Any, tmp_path: Path):
    (tmp_path / "t.txt").write_text("abcdefgh" * 100)

    def build(samples: int) -> Any:
        corpus = Corpus(
            train=(str(tmp_path / "t.txt"),),
            tokenizer="",
            rows="plain",
            seq_len=8,
            calibration_seq_len=8,
            calibration_samples=samples,
        )
        return build_training(corpus, tokenizer)

    assert [len(build(n).pool) for n in (5, 10, 40)] == [20, 25, 40]
    assert [len(build(n).blocks) for n in (5, 10, 40)] == [80, 75, 60]
    assert build(0).pool is None


def test_blocks_of_one_row_are_batches_too():
    assert Blocks(input_ids=torch.arange(6).reshape(2, 3)).batch(slice(1, 2))[
        "labels"
    ].tolist() == [[3, 4, 5]]


def test_text_that_is_trained_on_and_measured_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("some text", encoding="utf-8")
    (tmp_path / "c.txt").write_text("some text", encoding="utf-8")

    def noticed(train: str, val: str | None, calibration: str | None = None) -> bool:
        corpus = Corpus(train=(train,), tokenizer="t", val=val, calibration=calibration)
        return corpus.measures_training_text

    other = str(tmp_path / "c.txt")
    assert noticed("pydoc", "pydoc")
    assert noticed(str(folder), str(folder / "b.txt"))
    assert noticed(str(folder / "a.txt"), str(tmp_path / "texts" / ".." / "texts" / "a.txt"))
    assert noticed(other, str(folder), calibration=str(folder / "a.txt"))
    assert noticed("org/set", "org/set:train")
    assert not noticed("org/set:train", "org/set:test")
    assert not noticed(str(folder), other)
    assert not noticed(other, None)
