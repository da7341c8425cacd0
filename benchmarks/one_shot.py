"""Every one-shot method beside the row of a peer that does the same, without any training.

For each named run and seed, `plprune prune` runs in a process of its own on the same calibration
tokens (32 x 512 of WikiText-2's training text by default), then a referee that knows nothing of
plprune measures the export on the first windows of the test text: as many as the peer's value is
of. Values of different numbers of windows are never divided by each other; where they differ, what
is compared is how many times the dense model's perplexity each is, and no verdict is given.

    verdict   perplexity (mean over seeds) <= 1.03 x peer
    cost      CPU seconds of the whole pruning process, start and export included, in units of one
              dense pass over 40 windows of 1024 tokens; peak memory of that process
    seeds     one seed is not a result below 3 % of difference: use three

Times mean something on an idle machine only. Results are lines of `results.jsonl` in the output
folder: a benchmark that was killed goes on, and so does the pruning it was killed in. After a
change of the program give another folder.

usage: python benchmarks/one_shot.py --data DIR [--model DIR] [--only NAME ...] [--seeds 0]
    [--windows N] [--referee FILE] [--output DIR] [--list]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from one_shot_runs import DENSE, RUNS, Run

WINDOWS, LIMIT = 40, 1.03
CALIBRATION = {"calibration_samples": 32, "calibration_seq_len": 512, "seq_len": 512}


def main() -> int:
    """Run what is not done yet, print, judge."""
    options = _options()
    chosen = [run for run in RUNS if not options.only or run.name in options.only]
    if options.list:
        for run in chosen:
            common.say(f"{run.name:22} {run.peer.says() if run.peer else 'no peer'}")
        return 0
    bench = Bench(options)
    common.say(f"protocol: {json.dumps(bench.protocol)}")
    dense = {count: bench.dense(count) for count in sorted({bench.windows(r) for r in chosen})}
    for count, score in dense.items():
        known = DENSE.get(count)
        beside = f" (peers: {known})" if known else ""
        common.say(
            f"dense, {count} windows: {_ppl(score):.2f}{beside}, text {score['text_sha256']}"
        )
    common.say("cost and memory mean something on an idle machine only")
    for run in chosen:
        for seed in options.seeds:
            bench.row(run, seed)
    return conclude(bench, chosen, dense)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with train_head.txt and test.txt")
    parser.add_argument("--calibration", type=Path, help="text instead of DATA/train_head.txt")
    parser.add_argument("--text", type=Path, help="text instead of DATA/test.txt")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="names of --list")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, help="default: those of the peer's value")
    own = Path(__file__).with_name("referee.py")
    parser.add_argument("--referee", type=Path, default=own, help="default: referee.py")
    parser.add_argument("--output", type=Path, default=Path("runs/one_shot"))
    parser.add_argument("--keep", action="store_true", help="keep the exports")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    unknown = set(options.only) - {run.name for run in RUNS}
    if unknown:
        parser.error(f"unknown names: {', '.join(sorted(unknown))}; see --list")
    if options.windows is not None and options.windows < 2:
        parser.error("--windows: at least 2")
    if not options.list and options.data is None and None in (options.calibration, options.text):
        parser.error("give --data, or --calibration and --text")
    return options


class Bench:
    """One benchmark: its protocol, and the lines that are there."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.model is None:
            from plprune.demo import smollm2

            options.model = smollm2()
        self.options = options
        self.calibration = (options.calibration or options.data / "train_head.txt").absolute()
        self.text = (options.text or options.data / "test.txt").absolute()
        self.output = options.output.absolute()
        self.output.mkdir(parents=True, exist_ok=True)
        self.protocol = {
            "model": Path(options.model).name,
            "calibration": {
                "text": self.calibration.name,
                "sha256": hashlib.sha256(self.calibration.read_bytes()).hexdigest()[:16],
                **CALIBRATION,
            },
            "seeds": options.seeds,
            "referee": options.referee.name,
            "windows": options.windows or "those of the peer",
            "seq_len": 1024,
            "dtype": "float32",
            "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
        }
        self.file = self.output / "results.jsonl"
        text = self.file.read_text("utf-8") if self.file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # a kill may have left half a line
        self.file.write_text(whole, "utf-8")
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def windows(self, run: Run) -> int:
        """Windows to judge a run on."""
        return self.options.windows or (run.peer.windows if run.peer else WINDOWS)

    def find(self, **what: Any) -> dict[str, Any] | None:
        """The line that says so, of this model and these texts."""
        wanted = self._key() | what
        return next((x for x in self.lines if all(x.get(k) == v for k, v in wanted.items())), None)

    def _key(self) -> dict[str, Any]:
        texts = [str(self.calibration), str(self.text)]
        model, referee = (
            Path(one).absolute() for one in (self.options.model, self.options.referee)
        )
        return {"model": str(model), "texts": texts, "referee": str(referee)}

    def add(self, **line: Any) -> dict[str, Any]:
        """Keep a result."""
        line = self._key() | line
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def dense(self, windows: int) -> dict[str, Any]:
        """Score of the dense model, measured first."""
        return self._judged(Path(self.options.model), {"run": "dense"}, windows)

    def one_pass(self) -> float:
        """CPU seconds of a dense pass over 40 windows, without the start of the process."""
        few = self.dense(1)
        done = [line for line in self.lines if line.get("run") == "dense"]
        many = max(done, key=lambda line: line["windows"])
        return (many["cpu"] - few["cpu"]) / (many["windows"] - few["windows"]) * WINDOWS

    def row(self, run: Run, seed: int) -> None:
        """Prune and judge, unless the line is there."""
        settings = run.settings(seed)
        known = {"run": run.name, "seed": seed, "settings": settings}
        if self.find(**known, windows=self.windows(run)):
            return
        missing = [path for path in run.classes() if not _exists(path)]
        if missing:
            common.say(f"{run.name}: skipped, there is no {', '.join(missing)}")
            return
        target = self.output / f"{run.name}-{seed}"
        if self.find(step="pruned", **known) is None or not (target / "config.json").is_file():
            self._prune(run, seed, target, settings)
        score = self._judged(target, known, self.windows(run))
        common.say(f"{run.name}, seed {seed}: {_ppl(score):.2f}")
        if not self.options.keep:
            shutil.rmtree(target)

    def _prune(self, run: Run, seed: int, target: Path, settings: Mapping[str, Any]) -> None:
        file = self.output / f"{run.name}-{seed}.yaml"  # JSON is YAML
        file.write_text(json.dumps({"prune": settings}, indent=2), "utf-8")
        resumed = (target.parent / f".{target.name}.unfinished").is_dir()
        keys = {
            "model.pretrained": self.options.model,
            "data.tokenizer": self.options.model,
            "data.train": self.calibration,
            "data.seed": seed,
            **{f"data.{name}": value for name, value in CALIBRATION.items()},
            "output": target,
        }
        given = [f"--{name}={value}" for name, value in keys.items()]
        program = [sys.executable, "-m", "plprune.lit.cli", "prune", "--config", str(file)]
        spent = run_process([*program, *given, "--overwrite"], target.with_suffix(".log"))
        known = {"run": run.name, "seed": seed, "settings": dict(settings)}
        self.add(step="pruned", **known, **spent, resumed=resumed)

    def _judged(self, model: Path, known: Mapping[str, Any], windows: int) -> dict[str, Any]:
        done = self.find(**known, windows=windows)
        if done is not None:
            return done
        command = [sys.executable, str(self.options.referee), str(model), "--text", str(self.text)]
        if model != Path(self.options.model):  # widths by layer come with a modeling file of ours
            command.append("--trust-remote-code")
        log = self.output / "referee.log"
        spent = run_process([*command, "--windows", str(windows)], log)
        answer: dict[str, Any] = json.loads(log.read_text("utf-8").strip().splitlines()[-1])
        return self.add(step="judged", **known, **spent, **answer)


def run_process(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a process of its own.

    Args:
        command: what.
        log: gets its output.

    Returns:
        CPU seconds and peak memory in GiB of this process.
    """
    with log.open("w", encoding="utf-8") as out:
        # Modeling files of an export go where the log is, not among those of the user.
        own = {**os.environ, "HF_MODULES_CACHE": str(log.parent / "modules")}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=own)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text('utf-8')[-3000:]}")
    return {"cpu": used.ru_utime + used.ru_stime, "peak_gib": _gib(used)}


def _gib(used: resource.struct_rusage) -> float:
    # Linux says kilobytes, macOS bytes.
    return used.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _exists(path: str) -> bool:
    module, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


def _ppl(score: Mapping[str, Any]) -> float:
    """Referees name it one way or the other."""
    return float(score["ppl"] if "ppl" in score else score["perplexity"])


def conclude(bench: Bench, chosen: Sequence[Run], dense: Mapping[int, Mapping[str, Any]]) -> int:
    """Print the table; 1 if a run is worse than its peer."""
    seeds, good = bench.options.seeds, True
    titles = ("run", "per seed", "mean", "windows", "x dense", "peer", "ratio", "verdict")
    rows = [(*titles, "cost, dense passes", "peak GiB")]
    one_pass = bench.one_pass()
    for run in chosen:
        count = bench.windows(run)
        known = [{"run": run.name, "seed": s, "settings": run.settings(s)} for s in seeds]
        found = [bench.find(**one, windows=count) for one in known]
        scores = [_ppl(one) for one in found if one is not None]
        if not scores:
            continue
        mean = statistics.mean(scores)
        peer, ratio, verdict = against(run, count, mean, _ppl(dense[count]))
        good &= verdict != "WORSE"
        pruned = [bench.find(step="pruned", **one) for one in known]
        spent = [one for one in pruned if one is not None]
        whole = [one["cpu"] / one_pass for one in spent if not one["resumed"]]
        rows.append(
            (
                run.name,
                " ".join(f"{one:.2f}" for one in scores),
                f"{mean:.2f}",
                str(count),
                f"{mean / _ppl(dense[count]):.3f}",
                peer,
                ratio,
                verdict,
                f"{statistics.mean(whole):.2f}" if whole else "-",
                f"{max(one['peak_gib'] for one in spent):.2f}" if spent else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        common.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    common.say(f"one dense pass ({WINDOWS} windows): {one_pass:.1f} CPU s")
    return 0 if good else 1


def against(run: Run, windows: int, mean: float, dense: float) -> tuple[str, str, str]:
    """Peer, ratio and verdict in words.

    Args:
        run: with its peer.
        windows: it was judged on.
        mean: its perplexity.
        dense: perplexity of the dense model on the same windows.
    """
    if run.peer is None:
        return "-", "-", "control"
    value = run.peer.values.get(windows)
    if value is not None:
        ratio = mean / value
        verdict = "ok" if ratio <= LIMIT else "WORSE"
        return f"{value:.2f} ({run.peer.name})", f"{ratio:.3f}", verdict
    own = run.peer.values[run.peer.windows]
    times = own / DENSE[run.peer.windows]
    said = f"{own:.2f} on {run.peer.windows}, {times:.3f} x dense ({run.peer.name})"
    return said, f"~{mean / dense / times:.3f}", "other windows"


if __name__ == "__main__":
    raise SystemExit(main())
