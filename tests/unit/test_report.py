"""The report: exact JSON, honest sentences, pages that stand alone."""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from plprune.errors import ExportError
from plprune.plots import LEVELS, curve_plot, number, percent, score_plot, width_plot
from plprune.report import (
    Curve,
    CutRecord,
    LayerWidths,
    Report,
    Sample,
    Score,
    ScoreSummary,
    SizePair,
    SpeedPair,
    verdict,
)
from plprune.report_html import page, tables, to_markdown, write

HOSTILE = '<script>alert(1)</script> & "quotes" | pipe ``` fence $title ${body}\x00'


def make_report(layers=30, cuts=4, steps=200, seed=0):
    """A plausible run: the MLP of SmolLM2-135M is cut four times, no KV group is removed."""
    draw = random.Random(seed)
    widths = [1536 - 96 * cuts - 64 * (layer % 3) + 4 * (layer % 2) for layer in range(layers)]
    at = [round(steps * (number + 1) / (cuts + 1.5)) for number in range(cuts)]

    def loss(step, dense=False):
        hit = (
            0
            if dense
            else sum(0.7 * math.exp(-(step - cut) / 12) + 0.05 for cut in at if step >= cut)
        )
        return 2.7 + 0.5 * math.exp(-step / 40) + hit + draw.gauss(0, 0.04)

    def history(number):
        before = tuple(1536 - (1536 - width) * number // cuts for width in widths)
        after = tuple(1536 - (1536 - width) * (number + 1) // cuts for width in widths)
        groups = (3,) * layers
        return {
            "before": {"mlp": before, "kv_group": groups},
            "after": {"mlp": after, "kv_group": groups},
        }

    def summary(layer):
        scores = [math.exp(draw.gauss(-2 + layer / 12, 1.1)) for _ in range(400)]
        cut = sorted(scores)[int(400 * (1 - widths[layer] / 1536))]
        return ScoreSummary.of(kind="mlp", layer=layer, scores=scores, threshold=cut)

    run = tuple(range(steps))
    checks = tuple(range(0, steps, 10))
    return Report(
        title="SmolLM2-135M-Instruct, a quarter of the model removed while training",
        base_model="SmolLM2-135M-Instruct (30 layers, hidden 576, FFN 1536)",
        method="FLAP, global threshold, 4 cuts of 96 channels",
        asked="75 % of the block parameters",
        got="75.1 % of the block parameters",
        protocol={
            "date": "2026-01-31",
            "data": {
                "evaluation": {"name": "wikitext2 test", "sha256": "9f" * 32},
                "calibration": {"name": "c4 train", "sha256": "0a" * 32, "sequences": 32},
            },
            "windows": 40,
            "length": 1024,
            "dtype": "bfloat16",
            "seed": 0,
            "tokenizer": "SmolLM2 (49,152 entries)",
            "device": "CPU, 2 cores",
            "versions": {"torch": "2.9.0", "lightning": "2.6.0", "transformers": "5.20.0"},
            "plan_hashes": [f"{index}b" * 8 for index in range(cuts)],
            "command": "plprune fit --config configs/quickstart.yaml",
        },
        sizes={
            "params_prunable": SizePair(dense=106168320, pruned=79626240),
            "params_blocks": SizePair(dense=106202880, pruned=79660800),
            "params_non_embedding": SizePair(dense=106203456, pruned=79661376),
            "params_model": SizePair(dense=134515008, pruned=107972928),
            "bytes": SizePair(dense=269030016, pruned=215945856),
            "flops_per_token": SizePair(
                dense=339738624, pruned=286654464, note="at a context of 1,024 tokens"
            ),
            "kv_cache_bytes_per_token": SizePair(dense=23040, pruned=23040),
        },
        perplexity=(
            Score(data="wikitext2", dense=24.46, dense_trained=21.9, cut=61.2, recovered=27.31),
            Score(data="c4", dense=31.02, recovered=35.5, seeds=3, spread=0.21),
        ),
        speed=(
            SpeedPair(phase="prefill", batch=1, dense=812.0, pruned=967.0),
            SpeedPair(phase="prefill", batch=8, dense=1204.0, pruned=1421.0),
            SpeedPair(phase="decode", batch=1, dense=31.4, pruned=32.1),
        ),
        layers=tuple(
            LayerWidths(
                layer=layer,
                dense={"kv_group": 3, "mlp": 1536},
                kept={"kv_group": 3, "mlp": widths[layer]},
            )
            for layer in range(layers)
        ),
        scores=tuple(summary(layer) for layer in range(layers)),
        cuts=tuple(
            CutRecord(
                step=step,
                params=134515008 - 6635520 * (place + 1),
                time_share=0.031,
                plan_hash=f"{place}b" * 8,
                **history(place),
            )
            for place, step in enumerate(at)
        ),
        curves=(
            Curve(name="pruned", step=run, value=tuple(map(loss, run))),
            Curve(name="dense, same recipe", step=run, value=tuple(loss(s, True) for s in run)),
            Curve(
                name="wikitext2, 12 windows",
                step=checks,
                value=tuple(26.4 * math.exp(loss(step) - 3.2) for step in checks),
                quantity="validation perplexity",
            ),
        ),
        samples=(
            Sample(
                prompt="The capital of France is",
                dense=" Paris. It is the largest city in France and the seat of government.",
                pruned=" Paris. The city of Paris is the city of the city of Paris.",
            ),
            Sample(prompt="Markup stays text: <b>bold</b>", dense="<script>x</script>"),
        ),
        notes=("Short evaluation during training: 12 windows instead of 40.",),
    )


@pytest.fixture(scope="module")
def full():
    return make_report()


def has(report, *words):
    return any(all(word in line for word in words) for line in verdict(report))


# JSON


def test_json_round_trip_is_exact(full):
    text = json.dumps(full.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == full


def test_json_of_a_title_round_trips():
    report = Report(title="empty")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_non_finite_numbers_are_null_listed_and_restored():
    curve = Curve(name="loss", step=(0, 1, 2), value=(1.0, math.nan, -math.inf))
    score = Score(data="w.2", dense=20.0, recovered=math.inf)
    report = Report(title="t", curves=(curve,), perplexity=(score,), protocol={"a.b": [math.nan]})
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["curves"][0]["value"] == [1.0, None, None]
    assert [["curves", 0, "value", 1], "nan"] in data["non_finite"]
    back = Report.from_json(data)
    assert math.isnan(back.curves[0].value[1])
    assert back.curves[0].value[2] == -math.inf
    assert back.perplexity == (score,)
    assert math.isnan(back.protocol["a.b"][0])


def test_json_keeps_large_integers_and_every_digit():
    score = Score(data="x", dense=0.1 + 0.2)
    report = Report(title="t", sizes={"bytes": SizePair(dense=2**63 + 1)}, perplexity=(score,))
    back = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert back.sizes["bytes"].dense == 2**63 + 1
    assert back.perplexity[0].dense == 0.1 + 0.2


def test_json_refuses_what_it_cannot_hold():
    report = Report(title="t", protocol={"config": {"path": object()}})
    with pytest.raises(ExportError, match=r"protocol\.config\.path.*given object.*fix: convert"):
        report.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "plprune.report/0"}, r"not a report of this version: given 'plprune.report/0'"),
        ({"cuts": [{"stepp": 1}]}, r"cannot read cuts\.0: given .*stepp.*allowed step"),
        ({"cuts": [{}]}, r"cannot read cuts\.0"),
        ({"cuts": [3]}, r"cannot read cuts\.0"),
        ({"colour": 1}, r"cannot read the report"),
    ],
)
def test_from_json_names_what_it_cannot_read(change, message):
    with pytest.raises(ExportError, match=message):
        Report.from_json(Report(title="t").to_json() | change)


def test_data_is_checked_where_it_is_made():
    with pytest.raises(ExportError, match="2 steps and 1 values"):
        Curve(name="loss", step=(1, 2), value=(0.5,))
    with pytest.raises(ExportError, match="given 2 quantiles; allowed 7"):
        ScoreSummary(kind="mlp", layer=0, quantiles=(0.0, 1.0))
    with pytest.raises(ExportError, match="no scores of mlp in layer 3"):
        ScoreSummary.of(kind="mlp", layer=3, scores=[])


def test_score_summary_matches_quantiles_by_hand():
    found = ScoreSummary.of(kind="mlp", layer=0, scores=[float(n) for n in range(100, -1, -1)])
    assert found.quantiles == pytest.approx([100 * level for level in LEVELS])
    assert ScoreSummary.of(kind="mlp", layer=0, scores=[2.5]).quantiles == (2.5,) * 7


# Sentences


def sizes(**pairs):
    return {name: SizePair(dense=dense, pruned=pruned) for name, (dense, pruned) in pairs.items()}


def test_verdict_of_the_full_run_is_honest(full):
    first = verdict(full)[0]
    assert "19.7 % fewer parameters" in first
    assert "perplexity got worse by 11.7 %" in first
    assert "decoding is not faster, 1.02 times" in first
    assert has(full, "The KV cache is not smaller because no KV group was removed", "23,040")
    decoding = ("is not faster", "31.40 to 32.10", "the bytes of weights promise 1.25 times")
    assert has(full, "Decoding at batch 1", *decoding)
    assert has(
        full, "Prefill at batch 8", "the FLOPs at a context of 1,024 tokens promise 1.19 times"
    )
    assert has(full, "Prefill at batch 8 is faster, 1.18 times")
    assert has(full, "same recipe it got worse by 24.7 %")
    assert has(full, "MLP channels: widths not multiples of 64")
    assert has(full, "MLP channels", "stock classes cannot load")
    assert not has(full, "KV groups:")


def test_verdict_with_gain_has_no_complaint():
    report = Report(
        title="t",
        sizes=sizes(
            params_model=(100, 70),
            bytes=(200, 140),
            flops_per_token=(50, 35),
            kv_cache_bytes_per_token=(30, 20),
        ),
        perplexity=(Score(data="w", dense=20.0, dense_trained=20.0, recovered=19.0),),
        speed=(SpeedPair(phase="decode", batch=1, dense=10.0, pruned=14.0),),
        layers=(LayerWidths(layer=0, dense={"mlp": 1536}, kept={"mlp": 1024}),),
    )
    text = " ".join(verdict(report))
    assert not re.search(r"\bnot\b|worse|slower|\bno\b", text), text
    assert "30.0 % fewer parameters; perplexity got better by 5.0 %; decoding is faster" in text


def test_verdict_without_measurements_says_so():
    assert verdict(Report(title="t")) == [
        "Against the dense model: parameters not counted; perplexity was not measured; "
        "decoding was not timed on both models."
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("params_model", "The model is not smaller: 100 to 100 parameters."),
        ("bytes", "The weights do not take less memory: 100 to 100"),
        ("flops_per_token", "A token does not need less arithmetic: 100 to 100"),
    ],
)
def test_verdict_names_a_size_without_gain(name, words):
    assert has(Report(title="t", sizes=sizes(**{name: (100, 100)})), words)
    assert not has(Report(title="t", sizes=sizes(**{name: (100, 99)})), words)


def test_verdict_blames_kv_groups_only_when_they_are_all_there():
    pair = sizes(kv_cache_bytes_per_token=(8, 8))
    cut = (LayerWidths(layer=0, dense={"kv_group": 3}, kept={"kv_group": 2}),)
    assert has(Report(title="t", sizes=pair), "because no KV group was removed")
    assert not has(Report(title="t", sizes=pair, layers=cut), "because")


@pytest.mark.parametrize(
    ("pruned", "word"),
    [(10.5, "is faster"), (10.4, "is not faster"), (9.6, "is not faster"), (9.4, "is slower")],
)
def test_verdict_of_speed(pruned, word):
    pair = SpeedPair(phase="decode", batch=1, dense=10.0, pruned=pruned)
    assert has(Report(title="t", speed=(pair,)), "Decoding at batch 1 " + word)


@pytest.mark.parametrize(
    ("rounds", "word"),
    [
        ((1.1, 1.3, 1.4), "is faster, 1.30 times"),
        ((0.99, 1.3, 1.4), "is not clearly faster, 1.30 times"),
        ((0.95, 1.0, 1.1), "is not faster, 1.00 times"),
        ((0.6, 0.8, 1.1), "is not clearly slower, 0.80 times"),
        ((0.6, 0.8, 0.9), "is slower, 0.80 times"),
    ],
)
def test_a_gain_within_the_spread_of_the_rounds_is_none(rounds, word):
    pair = SpeedPair(phase="decode", batch=1, dense=10.0, pruned=10.0 * rounds[1], rounds=rounds)
    report = Report(title="t", speed=(pair,))
    assert has(report, "Decoding at batch 1 " + word, f"3 rounds: {pair.spread} times")
    assert f"decoding {word}" in verdict(report)[0]


def test_speed_is_compared_with_what_limits_it_at_the_length_that_was_timed():
    pairs = (
        SpeedPair(phase="prefill", batch=8, dense=1.0, pruned=1.2, prompt=128, flops_ratio=1.4),
        SpeedPair(phase="decode", batch=1, dense=1.0, pruned=1.2, prompt=16, decoded=32),
    )
    counted = sizes(bytes=(300, 200), flops_per_token=(100, 50))
    report = Report(title="t", sizes=counted, speed=pairs)
    prefill, decode = verdict(report)[-2:]
    assert prefill == (
        "Prefill at batch 8, prompts of 128 tokens, is faster, 1.20 times the dense speed "
        "(1.000 to 1.200 tokens/s; the FLOPs at 128 tokens promise 1.40 times)."
    )
    assert decode == (
        "Decoding at batch 1, 32 tokens after 16, is faster, 1.20 times the dense speed "
        "(1.000 to 1.200 tokens/s; the bytes of weights promise 1.50 times)."
    )
    rows = tables(report)["Speed"]
    assert [(row[0], *row[-2:]) for row in rows[1:]] == [
        ("prefill, batch 8, prompts of 128 tokens", "not recorded", "1.400 (FLOPs at 128 tokens)"),
        ("decode, batch 1, 32 tokens after 16", "not recorded", "1.500 (bytes of weights)"),
    ]


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ({"cut": 24.0}, "got worse by 20.0 %: 20.00 to 24.00, without recovery training."),
        ({"cut": 30.0}, "That much without recovery training: read the samples"),
        ({"cut": 30.0, "recovered": 24.0}, "got worse by 20.0 %: 20.00 to 24.00, after recovery"),
        ({"recovered": 24.0}, "No dense model was trained with the same recipe"),
        ({"recovered": 19.0}, "got better by 5.0 %"),
        ({"recovered": 20.001}, "is unchanged"),
        ({"recovered": 20.2}, "below 3 % is no result without three seeds"),
        ({"recovered": math.nan}, "is not finite (nan): the model is broken"),
    ],
)
def test_verdict_of_perplexity(score, words):
    assert has(Report(title="t", perplexity=(Score(data="w", dense=20.0, **score),)), words)


def test_verdict_needs_three_seeds_for_small_differences_only():
    close = Score(data="w", dense=20.0, recovered=20.2, seeds=3)
    far = Score(data="w", dense=20.0, recovered=24.0)
    assert not has(Report(title="t", perplexity=(close, far)), "three seeds")


def test_verdict_of_widths_ignores_untouched_and_removed_layers():
    def layer(index, dense, kept):
        return LayerWidths(layer=index, dense={"mlp": dense}, kept={"mlp": kept})

    report = Report(title="t", layers=(layer(0, 1000, 1000), layer(1, 1000, 0)))
    assert len(verdict(report)) == 1
    report = Report(title="t", layers=(layer(0, 1000, 960), layer(1, 1000, 900)))
    assert has(report, "not multiples of 64 (1 of 2 layers, such as 900)")
    assert has(report, "900 to 960 kept, so layers differ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (134515008, "134,515,008"),
        (1234.5, "1,234"),
        (24.456, "24.46"),
        (3.14159, "3.142"),
        (math.inf, "not finite (inf)"),
        (math.nan, "not finite (nan)"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_percent_has_no_negative_zero():
    assert percent(-0.0001) == "0.0 %"
    assert percent(0.1234) == "12.3 %"


# Pages


class Balance(HTMLParser):
    """Collects tags, attributes and text; fails on unbalanced tags."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attrs, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(html):
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser


def test_the_parser_of_these_tests_sees_an_unbalanced_page():
    with pytest.raises(AssertionError):
        parse("<div><p></div>")


def test_page_stands_alone(full):
    html = page(full)
    parser = parse(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(parser.tags)
    assert not {name for name, _ in parser.attrs} & {"src", "href", "xlink:href", "onload"}
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert parser.tags.count("svg") == 5


def test_page_has_every_part(full):
    html = page(full)
    for words in ("Size and cost", "Perplexity", "Speed", "Training", "Widths", "Scores", "Cuts"):
        assert f"<h2>{words}" in html
    for words in (
        "134,515,008",
        "107,972,928",
        "-19.7 %",
        "27.31",
        "0b0b0b0b",
        "9f9f9f9f",
        "cut 4",
    ):
        assert words in html
    assert (
        "Not measured: perplexity of the dense model with the same training on c4; perplexity of "
        "the pruned model without training on c4; some samples." in html
    )
    assert "<details>" not in html
    assert "<td>not recorded</td>" in html  # the config is missing from the protocol


def test_page_of_a_run_without_measurements():
    html = page(Report(title="only a title"))
    parser = parse(html)
    assert "table" not in parser.tags
    assert "svg" not in parser.tags
    missing = "Size and cost, Perplexity, Speed, Widths, Cuts, Protocol, Scores, Curves, Samples"
    assert f"Not measured: {missing}." in html


def test_a_report_without_gaps_says_so(full):
    (score, _), (sample, _) = full.perplexity, full.samples
    whole = dataclasses.replace(full, perplexity=(score,), samples=(sample,))
    assert "Everything was measured." in page(whole)


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"perplexity": (Score(data="w", dense=2.0, dense_trained=2.0, cut=3.0),)}, "after"),
        ({"speed": (SpeedPair(phase="decode", batch=1, dense=2.0),)}, "speed of decode at batch 1"),
        ({"cuts": (CutRecord(step=1, params=3),)}, "time of the cuts"),
        ({"cuts": (CutRecord(step=1, time_share=0.1),)}, "parameters after the cuts"),
        ({"sizes": {"bytes": SizePair(dense=1)}}, "Bytes of weights"),
    ],
)
def test_every_empty_cell_is_named(full, change, gap):
    (score, _), (sample, _) = full.perplexity, full.samples
    whole = {"perplexity": (score,), "samples": (sample,), **change}
    last = to_markdown(dataclasses.replace(full, **whole)).splitlines()[-1]
    assert last.startswith("Not measured: ")
    assert gap in last
    assert ";" not in last


def test_the_configuration_is_whole_and_collapsed(full):
    config = "model:\n  pretrained: a & <b>\n  note: '```'\n"
    report = dataclasses.replace(full, config=config)
    html = page(report)
    parser = parse(html)
    assert "details" in parser.tags
    assert ("open", None) not in parser.attrs
    assert config in parser.text
    assert f"\n````yaml\n{config}````\n" in to_markdown(report)
    assert report.to_json()["config"] == config
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("layers", [30, 80])
def test_page_is_small(layers):
    assert len(page(make_report(layers=layers, steps=20_000)).encode()) < 250_000


def test_all_text_is_escaped():
    """Every string of a report, wherever it is, comes out as text."""
    report = Report(
        title=HOSTILE,
        base_model=HOSTILE,
        method=HOSTILE,
        asked=HOSTILE,
        got=HOSTILE,
        protocol={HOSTILE: HOSTILE, "data": {HOSTILE: [HOSTILE]}},
        sizes={HOSTILE: SizePair(dense=2, pruned=1, note=HOSTILE)},
        perplexity=(Score(data=HOSTILE, dense=2.0, cut=3.0),),
        speed=(SpeedPair(phase=HOSTILE, batch=1, dense=1.0, pruned=2.0),),
        layers=(LayerWidths(layer=0, dense={HOSTILE: 4}, kept={HOSTILE: 2}),),
        scores=(ScoreSummary.of(kind=HOSTILE, layer=0, scores=[1.0, 2.0]),),
        cuts=(CutRecord(step=1, before={HOSTILE: (4,)}, after={HOSTILE: (2,)}, plan_hash=HOSTILE),),
        curves=(Curve(name=HOSTILE, step=(0, 1), value=(1.0, 2.0), quantity=HOSTILE),),
        samples=(Sample(prompt=HOSTILE, dense=HOSTILE, pruned=HOSTILE),),
        notes=(HOSTILE,),
        config=HOSTILE,
    )
    html = page(report)
    assert "script" not in parse(html).tags
    assert "<script" not in html
    markdown = to_markdown(report)
    outside = re.sub(r"(?ms)^(`{3,})(?:text|yaml)$.*?^\1$", "", markdown)
    assert "alert" in outside
    assert not re.search(r"(?<!\\)[<|`](?!\s|$)", outside.replace("| ", "").replace(" |", ""))


def test_markdown_tables_are_rectangular(full):
    lines = to_markdown(full).splitlines()
    width = 0
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            bars = len(re.findall(r"(?<!\\)\|", line))
            assert not before.startswith("|") or bars == width
            width = bars
    assert "| Parameters, whole model | 134,515,008 | 107,972,928 | 0.803 | -19.7 % |" in lines


@pytest.mark.parametrize(
    ("after", "column"),
    [
        ({"kv_group": (2, 1), "query_in_group": (6, 3)}, None),
        ({"kv_group": (3, 3), "query_in_group": (6, 6)}, "3 → 2"),
        ({"kv_group": (3, 3), "query_in_group": (9, 3)}, "3 → 1 to 3"),
        ({"kv_group": (3, 0), "query_in_group": (9, 0)}, "3 → 0 to 3"),
    ],
)
def test_query_heads_have_a_column_only_if_they_were_cut_and_count_per_group(after, column):
    before = {"kv_group": (3, 3), "query_in_group": (9, 9)}
    header, row = tables(Report(title="t", cuts=(CutRecord(step=1, before=before, after=after),)))[
        "Cuts"
    ]
    found = dict(zip(header, row, strict=True))
    assert found.get("query heads per KV group") == column
    assert "KV groups" in found


def test_tables_show_not_measured_in_place():
    report = Report(title="t", perplexity=(Score(data="w", dense=20.0, cut=30.0),))
    row = tables(report)["Perplexity"][1]
    assert row == (
        "w",
        "20.00",
        "not measured",
        "30.00",
        "not measured",
        "+50.0 %",
        "not measured",
        "1",
    )


# Plots


def corners(path):
    """The points of a path; a number that is none comes back as NaN."""
    pairs = (pair.split() for pair in re.split("[A-Za-z] ?", path.get("d", "").replace("nan", "?")))
    return [
        tuple(math.nan if "?" in part else float(part) for part in pair) for pair in pairs if pair
    ]


def paths_of(svg, tip=""):
    """The paths with a tooltip that starts like this, by tooltip."""
    groups = [(group.findtext("title"), group) for group in ElementTree.fromstring(svg).iter("g")]
    found = {}
    for title, group in groups:
        if title is not None and title.startswith(tip):
            found.setdefault(title, []).extend(group.findall("path"))
    return found


def texts_of(svg):
    return ["".join(item.itertext()) for item in ElementTree.fromstring(svg).iter("text")]


def is_finite(svg):
    paths = list(ElementTree.fromstring(svg).iter("path"))
    assert paths
    return all(math.isfinite(part) for path in paths for pair in corners(path) for part in pair)


def height(path):
    values = [y for _, y in corners(path)]
    return max(values) - min(values)


def test_the_helpers_of_these_tests_see_what_is_wrong():
    svg = '<svg><g><title>bar 1</title><path d="M 1 2L nan 5z"/></g><g><path d="M 0 0L 9 9"/></g></svg>'
    assert not is_finite(svg)
    assert is_finite(svg.replace("nan", "3.5"))
    assert list(paths_of(svg)) == ["bar 1"]
    assert paths_of(svg, "line") == {}
    assert height(paths_of(svg)["bar 1"][0]) == 3


def test_plots_are_well_formed_and_label_their_axes(full):
    loss = curve_plot(full.curves[:2], [cut.step for cut in full.cuts], "training loss")
    mlp = width_plot(full.layers, "mlp", "MLP channels")
    scores = score_plot(full.scores, "MLP channels")
    for svg, label, words in (
        (
            loss,
            "training loss over steps",
            ("optimizer step", "training loss", "pruned", "dense, same recipe", "cut", "cut 4"),
        ),
        (mlp, "MLP channels per layer", ("layer", "MLP channels", "dense model", "kept")),
        (
            scores,
            "score of MLP channels",
            ("layer", "score, log scale", "cut threshold", "median", "5 to 95 %", "25 to 75 %"),
        ),
    ):
        root = ElementTree.fromstring(svg)
        assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", label)
        assert set(words) <= set(texts_of(svg))
        assert is_finite(svg)


def test_plots_depend_on_nothing_but_the_data(full):
    """Not on the time, what was drawn before, or the user's matplotlibrc, which stays as it is."""
    import matplotlib

    first = page(full)
    theirs = {"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path", "axes.grid": False}
    with matplotlib.rc_context(theirs):
        before = matplotlib.rcParams.copy()
        assert page(full) == first
        assert before == matplotlib.rcParams


def test_plots_cannot_disturb_one_another_or_the_page(full):
    parser = parse(page(full))
    assert "id" not in {name for name, _ in parser.attrs}
    assert parser.tags.count("style") == 1  # the page's own
    assert not {"use", "defs", "image"} & set(parser.tags)


def test_plots_take_their_colours_from_the_page(full):
    html = page(full)
    drawings = "".join(re.findall("<svg.*?</svg>", html))
    used = set(re.findall(r"var\((--\w+)\)", drawings))
    assert {"--kept", "--outline", "--cut", "--quiet", "--rule", "--text", "--s2"} <= used
    for name in used:
        assert len(re.findall(f"{name}: #", html)) == 2, f"{name}: light and dark"
    assert not re.search("#[0-9a-f]{3}", drawings)


def test_texts_in_plots_are_text():
    """Neither markup nor mathematics, and letters that matplotlib's font lacks are no problem."""
    names = (HOSTILE, "训练 हिन्दी العربية", "$x^2$", "lone \ud800 surrogate")
    curves = [Curve(name=name, step=(0, 1), value=(1.0, 2.0)) for name in names]
    svg = curve_plot(curves, [], "loss in $")
    shown = [name.replace("\x00", "\ufffd").replace("\ud800", "\ufffd") for name in names]
    assert {*shown, "loss in $"} <= set(texts_of(svg))
    assert list(paths_of(svg)) == shown


def test_long_texts_are_broken_into_lines():
    curve = Curve(name="word " * 60, step=(0, 1), value=(1.0, 2.0), quantity="quantity " * 12)
    found = texts_of(curve_plot([curve], [], curve.quantity))
    assert max(map(len, found)) <= 90
    assert " ".join(found).count("word") == 60
    assert " ".join(found).count("quantity") == 12


def test_a_long_legend_does_not_shrink_the_drawing():
    def run(names):
        curves = [Curve(name=name, step=(0, 1), value=(1.0, 2.0)) for name in names]
        return height(paths_of(curve_plot(curves, [], "loss"))[names[0]][0])

    assert run(["a curve with a long name " + "x" * 40 * n for n in range(8)]) > 0.9 * run(["a"])


def test_width_plot_has_a_pair_of_bars_per_layer(full):
    found = paths_of(width_plot(full.layers, "mlp", "MLP channels"))
    tips = [f"layer {row.layer}: {row.kept['mlp']:,} of 1,536 kept" for row in full.layers]
    assert list(found) == tips
    for row, pair in zip(full.layers, found.values(), strict=True):
        kept, dense = map(height, pair)
        assert kept / dense == pytest.approx(row.kept["mlp"] / 1536, abs=0.005)


def test_width_plot_of_removed_and_missing_layers():
    rows = [
        LayerWidths(layer=0, dense={"mlp": 100}, kept={"mlp": 25}),
        LayerWidths(layer=1, dense={"mlp": 100}, kept={}),
        LayerWidths(layer=2, dense={"kv_group": 3}, kept={"kv_group": 3}),
    ]
    found = paths_of(width_plot(rows, "mlp", "w"))
    assert list(found) == ["layer 0: 25 of 100 kept", "layer 1: 0 of 100 kept"]
    assert height(found["layer 1: 0 of 100 kept"][0]) == 0
    assert texts_of(width_plot(rows[:1], "mlp", "w"))[:2] == ["0", "layer"]  # one layer: one tick


def test_score_plot_has_a_box_and_a_threshold_per_layer(full):
    svg = score_plot(full.scores, "MLP channels")
    assert len(paths_of(svg)) == 2 * len(full.scores)
    for row in full.scores:
        assert len(paths_of(svg, f"layer {row.layer}: median {number(row.quantiles[3])}")) == 1
        assert len(paths_of(svg, f"layer {row.layer}: cut threshold {number(row.threshold)}")) == 1


@pytest.mark.parametrize("top", [100.0, 19.0])
def test_score_plot_puts_the_threshold_where_the_scores_are(top):
    """On a logarithmic and on a linear axis: y grows downwards."""
    for threshold, side in ((7.0, "below"), (8.0, "edge"), (9.0, "inside"), (13.0, "above")):
        row = ScoreSummary(
            kind="mlp", layer=0, quantiles=(1.0, 1.0, 8.0, 9.0, 12.0, top, top), threshold=threshold
        )
        box, line = (paths[0] for paths in paths_of(score_plot([row], "mlp")).values())
        top_y, bottom_y = min(y for _, y in corners(box)), max(y for _, y in corners(box))
        (_, y), (_, same) = corners(line)
        assert y == same
        if y == pytest.approx(bottom_y, abs=0.15):
            assert side == "edge"
        else:
            assert side == ("above" if y < top_y else "below" if y > bottom_y else "inside")


def test_score_plot_without_thresholds_shows_none():
    rows = [ScoreSummary.of(kind="mlp", layer=0, scores=[1.0, 2.0, 3.0])]
    svg = score_plot(rows, "mlp")
    assert len(paths_of(svg)) == 1
    assert "cut threshold" not in texts_of(svg)


def test_score_plot_of_odd_scores():
    rows = [
        ScoreSummary.of(kind="mlp", layer=0, scores=[0.0, 0.0]),
        ScoreSummary.of(kind="mlp", layer=1, scores=[-1.0, 2.0], threshold=0.5),
        ScoreSummary(kind="mlp", layer=2, quantiles=(math.nan,) * 7, threshold=math.inf),
    ]
    svg = score_plot(rows, "mlp")
    assert is_finite(svg)
    assert texts_of(svg).count("×") == 1
    assert [tip.split()[:3] for tip in paths_of(svg)] == [
        ["layer", "0:", "median"],
        ["layer", "1:", "median"],
        ["layer", "1:", "cut"],
    ]
    svg = score_plot(rows[2:], "mlp")
    assert is_finite(svg)
    assert "median" not in texts_of(svg)


@pytest.mark.parametrize(
    ("value", "log"),
    [
        ((1.0, 20.0), False),
        ((1.0, 20.5), True),
        ((1.0, math.nan, 20.5), True),
        ((1.0, math.inf), False),
        ((0.0, 100.0), False),
        ((-1.0, 100.0), False),
        ((1e-8, 1e30), True),
    ],
)
def test_the_axis_is_logarithmic_from_a_factor_of_twenty(value, log):
    curve = Curve(name="a", step=tuple(range(len(value))), value=value)
    assert ("loss, log scale" in texts_of(curve_plot([curve], [], "loss"))) is log
    assert ("loss" in texts_of(curve_plot([curve], [], "loss"))) is not log


@pytest.mark.parametrize(("value", "ticks"), [((1.0, 200.0), "1 2 5 10 20"), ((1.0, 1e4), "1 10")])
def test_a_logarithmic_axis_has_plain_numbers(value, ticks):
    found = texts_of(curve_plot([Curve(name="a", step=(0, 1), value=value)], [], "loss"))
    assert set(ticks.split()) <= set(found)
    assert ("20" in found) is ("20" in ticks)


def test_curve_plot_draws_every_point_and_cut():
    curve = Curve(name="run", step=(0, 10, 20, 40), value=(3.0, 1.0, 2.0, 1.0))
    svg = curve_plot([curve], [10, 30], "loss")
    (line,) = paths_of(svg, "run")["run"]
    (start, high), (first, low), (_, middle), (end, last) = corners(line)
    assert high < middle < low == last  # y grows downwards
    assert (middle - high) / (low - high) == pytest.approx(0.5, abs=0.01)
    cuts = paths_of(svg, "cut")
    assert list(cuts) == ["cut 1 at step 10", "cut 2 at step 30"]
    places = [corners(path)[0][0] for (path,) in cuts.values()]
    assert places == pytest.approx([first, start + 0.75 * (end - start)], abs=0.2)
    assert {"cut", "cut 1", "cut 2"} <= set(texts_of(svg))
    assert not {"cut", "cut 1"} & set(texts_of(curve_plot([curve], [], "loss")))


def test_curve_plot_numbers_cuts_only_where_there_is_room():
    curve = Curve(name="run", step=(0, 1000), value=(2.0, 1.0))
    svg = curve_plot([curve], [*range(100, 140), 900], "loss")
    assert len(paths_of(svg, "cut ")) == 41
    assert [text for text in texts_of(svg) if text.startswith("cut ")] == ["cut 1", "cut 41"]


def test_curve_plot_breaks_at_non_finite_values_and_marks_them():
    clean = Curve(name="a", step=(0, 1, 2, 3, 4), value=(1.0, 1.5, 2.0, 2.5, 2.0))
    broken = dataclasses.replace(clean, value=(1.0, 1.5, math.nan, 2.5, 2.0))
    for curve, crosses in ((clean, 0), (broken, 1)):
        svg = curve_plot([curve], [], "loss")
        assert texts_of(svg).count("×") == crosses
        (line,) = paths_of(svg)["a"]
        assert line.get("d").count("M") == 1 + crosses
        assert len(corners(line)) == 5 - crosses


def test_curve_plot_shows_a_point_without_neighbours():
    curve = Curve(name="a", step=(0, 1, 2, 3), value=(1.0, math.inf, 2.0, 3.0))
    _, dot = paths_of(curve_plot([curve], [], "loss"))["a"]
    assert len(set(corners(dot))) == 1
    assert "stroke-linecap: round" in dot.get("style")
    _, dot = paths_of(curve_plot([Curve(name="a", step=(5,), value=(2.0,))], [], "loss"))["a"]
    assert len(set(corners(dot))) == 1


def test_curve_plot_thins_long_curves_but_keeps_peaks():
    draw = random.Random(0)
    value = [1.0 + 0.1 * draw.random() for _ in range(50_000)]
    value[31_234] = 9.0
    long = Curve(name="a", step=tuple(range(50_000)), value=tuple(value))
    short = Curve(name="a", step=(0, 31_234, 49_999), value=(1.0, 9.0, 1.0))
    svg = curve_plot([long], [], "loss")
    assert len(svg) < 100_000
    peaks = []
    for curve in (long, short):
        (line,) = paths_of(curve_plot([curve], [], "loss"))["a"]
        peaks.append(min(corners(line), key=lambda corner: corner[1]))
    assert peaks[0] == pytest.approx(peaks[1], abs=1)


def test_curve_plot_of_a_diverged_run_stays_small():
    step = tuple(range(20_000))
    nan = curve_plot([Curve(name="a", step=step, value=(math.nan,) * 20_000)], [], "loss")
    assert 50 < texts_of(nan).count("×") <= 101
    mixed = curve_plot([Curve(name="a", step=step, value=(1.0, math.nan) * 10_000)], [], "loss")
    assert max(len(nan), len(mixed)) < 100_000


@pytest.mark.parametrize(
    "curve",
    [
        Curve(name="one", step=(5,), value=(2.0,)),
        Curve(name="flat", step=(0, 1), value=(0.0, 0.0)),
        Curve(name="all nan", step=(0, 1), value=(math.nan, math.inf)),
        Curve(name="wide", step=(0, 1), value=(1e-8, 1e30)),
        Curve(name="negative", step=(0, 10**7), value=(-3.0, -2.9999)),
        Curve(name="float32", step=(0, 1), value=(-3.4e38, 3.4e38)),
    ],
)
def test_curve_plot_of_odd_curves(curve):
    assert is_finite(curve_plot([curve], [3], "loss"))


# Writing


def test_write_makes_three_files_and_nothing_else(full, tmp_path):
    where = write(full, tmp_path / "runs" / "report")
    assert sorted(item.name for item in where.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert [item.name for item in where.parent.iterdir()] == ["report"]
    assert Report.from_json(json.loads((where / "report.json").read_text("utf-8"))) == full
    assert (where / "report.md").read_text("utf-8") == to_markdown(full)


def test_write_overwrites_only_when_told(full, tmp_path):
    where = write(Report(title="old"), tmp_path / "report")
    with pytest.raises(ExportError, match=r"given report with report.html.*or overwrite=True"):
        write(full, where)
    assert "old" in (where / "report.md").read_text("utf-8")
    write(full, where, overwrite=True)
    assert "SmolLM2" in (where / "report.md").read_text("utf-8")
    assert [item.name for item in tmp_path.iterdir()] == ["report"]


def test_write_uses_an_empty_directory(tmp_path):
    assert (write(Report(title="t"), tmp_path) / "report.html").exists()


def test_write_never_removes_other_files(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(ExportError, match=r"with model.safetensors.*or overwrite=True"):
        write(Report(title="t"), tmp_path)
    for title in ("first", "second"):
        write(Report(title=title), tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_text() == "weights"
    assert "second" in (tmp_path / "report.md").read_text("utf-8")
    assert len(list(tmp_path.iterdir())) == 4


def test_write_refuses_a_file(tmp_path):
    (tmp_path / "report").write_text("text")
    with pytest.raises(ExportError, match=r"given the file report;.*another directory$"):
        write(Report(title="t"), tmp_path / "report", overwrite=True)
    assert (tmp_path / "report").read_text() == "text"


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    where = write(Report(title="old"), tmp_path / "report")

    def fail(self, target):
        if self.suffix != ".old" and target == where and self.name.startswith("."):
            raise OSError("disk")
        return rename(self, target)

    path = type(where)
    rename = path.rename
    monkeypatch.setattr(path, "rename", fail)
    with pytest.raises(OSError, match="disk"):
        write(Report(title="new"), where, overwrite=True)
    assert "old" in (where / "report.md").read_text("utf-8")
    assert [item.name for item in tmp_path.iterdir()] == ["report"]


def test_import_needs_no_heavy_library_and_drawing_no_pyplot():
    """Importing pyplot chooses a backend for the whole process."""
    heavy = ("lightning", "transformers", "matplotlib")
    code = f"""
        import sys
        from plprune.report import Curve, LayerWidths, Report, ScoreSummary
        from plprune.report_html import page
        print([name for name in {heavy} if name in sys.modules])
        html = page(
            Report(
                title="t",
                layers=(LayerWidths(layer=0, dense={{"mlp": 2}}, kept={{"mlp": 1}}),),
                scores=(ScoreSummary.of(kind="mlp", layer=0, scores=[1.0, 2.0], threshold=1.5),),
                curves=(Curve(name="a", step=(0, 1), value=(1.0, 2.0)),),
            )
        )
        print(html.count("<svg"), "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "3 True False", ""]
