import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_rb.cli import main
from hf_rb.hub.card import ModelCardData, write_model_card
from hf_rb.report import Figure, figures, make_report, read_source, write_report
from hf_rb.report.page import Report
from hf_rb.report.panels import PANELS, _tokens, overview


pytest.importorskip("matplotlib")

CARD = """---
tags:
- hf_rb
---

# run

Made from [a/b](https://huggingface.co/a/b) and `other` with the data `tiny:math` by [`hf_rb`](https://github.com/hf-rb/hf_rb) (`hf_rb.SFTTrainer`).

- **ProFit** ([paper](https://huggingface.co/papers/2601.09195)): What it does.

## Hyper-parameters

What differs from the defaults:

| name | value |
|---|---|
| `profit_threshold` | `0.1` |

## Versions

- hf_rb 0.1
- torch 2.13.0

## Citation
"""


def log(**series):
    """A log with an entry a step of what is given as lists."""
    length = max(map(len, series.values()))
    return [{"step": 10 * (i + 1)} | {k: v[i] for k, v in series.items() if i < len(v)} for i in range(length)]


def token_row(words, **columns):
    """A row of token samples; the first word is the prompt."""
    return {"tokens": words, **{name: [None, *values] for name, values in columns.items()}}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def profit_run(tmp_path):
    row = token_row(
        ["Q <b>&", " four", "|five", " <end>"], prob=[0.9, 0.04, 0.6], top_prob=[0.9, 0.8, 0.6], correct=[True, False, True],
        kept=[True, False, True],
    )  # fmt: skip
    before = token_row(["Q", "x", "y"], prob=[0.5, 0.5], top_prob=[0.5, 0.5], correct=[True, False], kept=[True, True])
    folder = write(
        tmp_path / "profit",
        trainer_state={"log_history": log(loss=[2.0, 1.0], **{"profit/kept_fraction": [0.9, 0.95]})},
        token_samples={
            "methods": ["profit"],
            "snapshots": [{"step": 0, "rows": [before]}, {"step": 20, "rows": [row]}],
        },
        eval_results={"eval_loss": 1.5},
    )
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def kd_run(tmp_path):
    columns = dict(
        prob=[0.9, 0.1], top_prob=[0.9, 0.5], correct=[True, False], top10=[0.4, 0.6], loss=[0.1, 2.0], forward_kl=[0.1, 1.0],
        reverse_kl=[0.2, 5.0], akl_weight=[0.3, 0.9], hpd_w_label=[1.0, -0.5], hpd_w_sample=[-0.2, 0.0],
    )  # fmt: skip
    snapshots = [{"step": step, "rows": [token_row(["Q", " a", " b"], **columns)]} for step in (0, 5)]
    state = {"log_history": log(loss=[1.0, 0.5], reverse_kl=[0.4, 0.3])}
    return write(tmp_path / "kd", trainer_state=state, token_samples={"methods": ["akl"], "snapshots": snapshots})


@pytest.fixture
def rl_run(tmp_path):
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows = [
        dict(
            step=1,
            prompt=[{"role": "user", "content": "1 + 1?"}],
            error_class=name,
            advantage=base,
            shaped_advantage=after,
        )
        for name, base, after in (
            (None, 1.0, 1.0),
            ("3", -0.5, -0.9),
            ("3", -0.5, -0.9),
            ("4", -0.5, -0.2),
            (None, None, None),
        )
    ]
    folder = write(tmp_path / "rl", trainer_state={"log_history": log(loss=[0.1, 0.2], reward=[0.1, 0.3])})
    (folder / "completions").mkdir()
    write_table(Table.from_pylist(rows), folder / "completions" / "completions_00001.parquet")
    return folder


@pytest.fixture
def documents(tmp_path):
    layers = [
        {
            "name": f"model.layers.{i}.mlp.{kind}",
            "weights": 100,
            "relative_error": 0.1 * (i + 1),
            "baseline_error": 0.2,
        }
        for i in range(2)
        for kind in ("up_proj", "down_proj")
    ]
    quantized = dict(
        method="ptqtp", layers=layers, bits_per_weight=3.4, file_bytes=1000, source_bytes=4000, baseline_file_bytes=1100,
        blocks=[], allocation=[], eval_data="tiny:math", perplexity_before=3.0, perplexity_after=3.2, verdict="Plain rounding.",
    )  # fmt: skip
    routed = {
        "name": "model.layers.0.mlp",
        "load": [0.5, 0.25, 0.25, 0.0],
        "max_vio": 1.0,
        "batch_max_vio": 1.1,
        "dead": 1,
    }
    routed |= {"load_entropy": 0.75, "entropy": 0.9, "row_cosine": 0.1}
    routed |= {"lambda_learned": 0.3, "lambda_effective": 0.9, "lambda_random": 0.7}
    doctor = {
        "model": "m",
        "data": "tiny:math",
        "mpi": True,
        "tokens": 1024,
        "layers": [routed, routed],
        "notes": ["Dead."],
    }
    evaluated = {
        "model": "m", "task": "tiny:math", "results": [{"metric": "exact match", "value": 0.5, "dataset": "tiny:math"}],
        "size": {"file_bytes": 4000}, "exact_match": {"by_kind": {"add": 0.75, "buy": 0.25}}, "speed": {"batch_size": 1, "tokens_per_second": 12.0},
    }  # fmt: skip
    measured = {"model": "quantized", "bytes": 10, "exact_match": 0.5, "perplexity": 3.0, "tokens_per_second": 5.0}
    failures = {"quantized": {"flipped": 5, "flipped_by_kind": {"ledger": 4, "share": 1}}}
    recovered = {"task": "tiny:math", "problems": 300, "failures": failures, "rows": [measured], "notes": []}
    return write(tmp_path / "documents", quantized=quantized, doctor=doctor, evaluated=evaluated, recovered=recovered)


@pytest.fixture
def no_drawings(monkeypatch):
    """Leaves the drawings out, for which most of the time goes."""
    monkeypatch.setattr(figures, "_finish", lambda canvas, caption: Figure("<svg/>", caption))


class References(HTMLParser):
    """What a page refers to."""

    def __init__(self):
        super().__init__()
        self.tags, self.found = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]


def test_the_page_refers_to_nothing_outside_itself(profit_run, kd_run, rl_run, documents):
    page = make_report([read_source(path) for path in (profit_run, kd_run, rl_run, documents)]).html()
    references = References()
    references.feed(page)
    assert not references.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert {
        reference[:1] for reference in references.found if not reference.startswith("data:image/svg+xml;base64,")
    } == {"#"}
    assert not re.search(r"url\(|@import|https?:", re.sub(r"base64,[\w+/=]+", "", page))
    assert {name for name in re.findall(r'id="(p\d+)"', page)} == {
        name[1:] for name in references.found if name[0] == "#"
    }


def test_a_drawing_has_no_date_and_no_reference(kd_run):
    import base64

    first, second = (make_report([read_source(kd_run)]).html() for _ in range(2))
    assert first == second
    for encoded in re.findall(r"base64,([\w+/=]+)", first):
        svg = base64.b64decode(encoded).decode()
        assert "<metadata" not in svg and "<script" not in svg
        outside = [
            one for one in re.findall(r'(?:href|src)="([^"]+)"', svg) if one[0] != "#" and not one.startswith("data:")
        ]
        assert not outside and not re.search(r"url\((?!#)", svg)


def test_names_are_neither_formulas_nor_markup(tmp_path):
    image = "<img src=x.png> ![x](x.png)"
    measured = {"model": image, "bytes": 10, "exact_match": 0.5, "perplexity": 3.0, "tokens_per_second": 5.0}
    recovered = {"task": image, "problems": 3, "failures": {}, "rows": [measured], "notes": [image]}
    runs = [
        write(tmp_path / name, trainer_state={"log_history": log(loss=[2.0, 1.0])}, report=recovered)
        for name in ("a$x_$", "_b")
    ]
    html, markdown = write_report(runs, tmp_path / "r.html")
    assert "<img src=x" not in html.read_text() and "&lt;img src=x.png&gt;" in html.read_text()
    assert "<img" not in markdown.read_text() and "![" not in markdown.read_text()


def test_axes_say_what_they_count(profit_run, kd_run, rl_run, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures,
        "_finish",
        lambda canvas, caption: drawn.update({caption: canvas.axes[0]}) or Figure("<svg/>", caption),
    )
    make_report([read_source(path) for path in (profit_run, kd_run, rl_run)])

    def axis(start):
        return next(axis for caption, axis in drawn.items() if caption.startswith(start))

    for start, x, y in (
        ("Probability of the labels", "probability of the label", "labels"),
        ("AKL weight of the head", "akl/weight", "tokens"),
        ("The same, counted", "advantage", "rollouts"),
    ):
        assert (axis(start).get_xlabel(), axis(start).get_ylabel()) == (x, y)
    places = axis("Mean KL")
    assert places.get_xlabel().endswith("%") and places.get_xlim() == (0, 100)
    assert all(tick == int(tick) for tick in places.get_xticks())


def test_profit_shows_what_was_masked(profit_run, no_drawings):
    report = make_report([read_source(profit_run)])
    assert list(report.panels) == ["Overview", "Training", "ProFit: what was masked", "Evaluations", "Environment"]
    text, page = report.markdown(), report.html()
    assert "| loss | 2 | 1 | 2 | 1 | 20 |" in text and "profit/kept_fraction | 0.9 | 0.95" in text
    assert "| at step 20 | 3 | 33.3% | 0.75 | 0.04 | 0.0% | 100.0% | 0.0% |" in text
    assert "most dropped labels. What stands in ⟦ ⟧ left the loss." in text and "Struck out" in page
    assert "\n    Q <b>& four⟦|five⟧ <end>" in text and "| '\\|five' | 1 | 1 | 100% |" in text
    assert 'class="d"' in page and "Q &lt;b&gt;&amp;" in page and "<b>" not in page
    assert "| before training | 2 | 0.500 | 0.500 | 0.000 |" in text  # calibration: one of two right at 0.5
    assert "| `profit_threshold`" not in text and "| profit_threshold | 0.1 |" in text and "| torch | 2.13.0 |" in text
    assert "eval_loss | 1.5" in text


def test_sequences_without_dropped_labels_are_left_out(profit_run, no_drawings):
    path = profit_run / "token_samples.json"
    samples = json.loads(path.read_text())
    kept = token_row(["P", " six"], prob=[0.9], top_prob=[0.9], correct=[True], kept=[True])
    samples["snapshots"][-1]["rows"].insert(0, kept)
    path.write_text(json.dumps(samples))
    text = make_report([read_source(profit_run)]).markdown()
    assert "⟦|five⟧" in text and "    P six" not in text


def test_distillation_shows_where_they_differ(kd_run, no_drawings):
    report = make_report([read_source(kd_run)])
    text = report.markdown()
    assert "colour" in report.html() and "colour" not in text and "    Q a b" not in text  # colours say all of it
    assert "| KL(student ‖ teacher) | 2.6 | 2.6 |" in text and "| top-10 tokens in common | 0.5 | 0.5 |" in text
    assert "| AKL weight of the head | 0.6 | 0.6 |" in text
    assert "| HPD weight of the label | 0.25 | 0.25 |" in text and "| HPD weight of the draw | -0.1 | -0.1 |" in text
    assert "| 'Q a' → ' b' | 5 | 0.1 |" in text


def test_rl_shows_shaping_and_error_classes(rl_run, no_drawings):
    text = make_report([read_source(rl_run)]).markdown()
    assert "Advantages of 4 rollouts; shaping changed 75.0%." in text
    assert "| wrong answers | 3 | -0.5000 | -0.6667 | 0.4000 |" in text
    assert "| 1 + 1? | 3 | 2 of 5 | 1 | -0.4000 |" in text
    assert "| 2 | 2 | 66.7% |" in text and "3 wrong rollouts." in text


def test_without_completions_the_flag_is_told(rl_run, tmp_path, no_drawings):
    run = write(
        tmp_path / "unlogged", trainer_state={"log_history": log(loss=[0.1, 0.2], **{"rewards/math/mean": [0, 1]})}
    )
    first, second = (make_report([read_source(path)]).markdown() for path in (rl_run, run))
    assert "log_completions: true" not in first and "log_completions: true" in second


def test_documents_have_their_panels(documents, no_drawings):
    report = make_report([read_source(documents)])
    text = report.markdown()
    assert "| documents (ptqtp) | 1,000 | 3.4 | 0.1581 | 3.2 |" in text and "Plain rounding." in text
    assert "| up_proj | 2 | 200 | 0.1581 | 0.2 |" in text
    assert (
        "| model.layers.0.mlp | 1 | 1.1 | 1 |" in text
        and "1,024 tokens of tiny:math; MPI routers." in text
        and "Dead." in text
    )
    assert "| exact match | tiny:math | 0.5 |" in text and "| buy | 25.0% |" in text
    assert "| quantized | – | – | 10 | 0.5 | – | 3 | 5 |" in text


def test_several_runs_share_their_curves(profit_run, kd_run, documents, no_drawings):
    report = make_report([read_source(path) for path in (profit_run, kd_run, documents / "doctor.json")])
    text = report.markdown()
    assert "# profit, kd, doctor.json" in text
    assert "| run | model | data | method | final numbers |\n| --- | --- | --- | --- | --- |" in text
    assert "| layer | MaxVio | of" in text and "|\n| --- | ---: | ---: |" in text
    assert "| profit | loss | 2 | 1 | 2 | 1 | 20 |" in text and "| kd | loss | 1 | 0.5 | 1 | 0.5 | 20 |" in text
    # A panel of one of them says which.
    assert (
        "## ProFit: what was masked\n\n### profit\n" in text
        and "## Mixture of experts: the router doctor\n\n### doctor.json\n" in text
    )
    assert "## Environment\n\n### profit\n" in text


def test_the_overview_says_what_runs_are_and_where_they_ended(profit_run, kd_run, documents, tmp_path, no_drawings):
    short = write(
        tmp_path / "short",
        trainer_state={"log_history": [{"step": 3, "train_loss": 0.5}]},
        eval_results={"eval_loss": 1.5},
    )
    files = [documents / f"{name}.json" for name in ("quantized", "doctor", "evaluated", "recovered")]
    text = make_report([read_source(path) for path in (profit_run, kd_run, short, *files)]).markdown()
    for row in (
        "| profit | a/b and other | tiny:math | ProFit | loss 1 |",
        "| kd | – | – | AKL | loss 0.5 |",
        "| short | – | – | – | train_loss 0.5 |",
        "| quantized.json | – | tiny:math | PTQTP | 3.4 bits a weight; perplexity 3.2 |",
        "| doctor.json | m | tiny:math | – | MaxVio at most 1 |",
        "| evaluated.json | m | tiny:math | – | exact match 0.5 |",
        "| recovered.json | – | tiny:math | – | quantized: exact match 0.5 |",
        "| ledger | 4 |",
    ):
        assert row in text


def test_the_overview_reads_our_cards(tmp_path):
    def row(**data):
        write_model_card(tmp_path, ModelCardData("m", **data))
        return overview.build([read_source(tmp_path)], False)[0].rows[0][1:4]

    made = row(base_model=["a/b", "/folder/c"], dataset_name="d/e", methods=["akl", "hpd"], trainer="GKDTrainer")
    assert made == ["a/b and c", "d/e", "AKL, HPD"]
    assert row(base_model="tiny:student", trainer="SFTTrainer") == ["tiny:student", "–", "SFT"]
    assert row(dataset_name="tiny:math") == ["–", "tiny:math", "–"]
    (tmp_path / "model").mkdir()
    (tmp_path / "README.md").rename(tmp_path / "model/README.md")  # as `hf-rb recover` leaves it
    assert overview.build([read_source(tmp_path)], False)[0].rows[0][2] == "tiny:math"


def test_runs_of_one_name_are_told_apart(profit_run, tmp_path, no_drawings):
    other = write(tmp_path / "b" / "profit", trainer_state={"log_history": log(loss=[7.0, 6.0])})
    text = write_report([profit_run, other], tmp_path / "r.html")[1].read_text()
    assert f"| {profit_run} | loss | 2 |" in text and f"| {other} | loss | 7 |" in text


def test_routers_in_the_log_become_a_map(tmp_path, no_drawings):
    series = {f"router/model.layers.{i}.mlp/max_vio": [1.0, 0.5] for i in range(2)} | {"router/max_vio": [1.0, 0.5]}
    report = make_report(
        [read_source(write(tmp_path / "moe", trainer_state={"log_history": log(loss=[1, 2], **series)}))]
    )
    text = report.markdown()
    assert "MaxVio of every layer at 2 logs" in text and "| router/max_vio | 1 | 0.5 |" in text


def test_numbers_of_a_method_are_no_curves_of_the_run(tmp_path, no_drawings):
    logs = log(loss=[2, 1], eval_loss=[2, 1], eval_forward_kl=[0.2, 0.1], eval_num_tokens=[1, 2])
    text = make_report([read_source(write(tmp_path / "run", trainer_state={"log_history": logs}))]).markdown()
    assert "| eval_loss | 2 |" in text and "eval_forward_kl" not in text and "eval_num_tokens" not in text


def test_a_run_without_an_end_is_read_from_its_last_checkpoint(tmp_path, no_drawings):
    for step in (2, 10):
        write(tmp_path / "run" / f"checkpoint-{step}", trainer_state={"log_history": log(loss=[float(step)] * 2)})
    assert "| loss | 10 | 10 |" in make_report([read_source(tmp_path / "run")]).markdown()


def test_the_verb(profit_run, tmp_path, capsys, no_drawings):
    out = tmp_path / "page.html"
    assert main(["report", str(profit_run), "--out", str(out)]) == 0
    assert "page.html" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>") and out.with_suffix(".md").read_text().startswith("# profit")
    assert main(["report", str(profit_run), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["report", str(profit_run), "--out", str(out), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["markdown"].endswith("page.md")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "There is nothing to report on in run: no training log"),
        ({"config": {"model_type": "qwen3"}}, "nothing to report on"),
        ({"trainer_state": '{"log_history": [{"step"'}, "trainer_state.json is not valid JSON"),
        ({"trainer_state": {"global_step": 3}}, "trainer_state.json has no list `log_history`"),
        ({"trainer_state": {"log_history": [1]}}, "trainer_state.json has no list `log_history`"),
        ({"token_samples": "[]]"}, "token_samples.json is not valid JSON"),
        (
            {"report": {"method": "ptqtp", "layers": [{}], "bits_per_weight": 2}},
            "cannot read what it found in run (KeyError",
        ),
    ],
)
def test_what_cannot_be_reported_on_is_refused(files, message, tmp_path, capsys):
    write(tmp_path / "run", **files)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_comparison_leaves_out_a_source_with_nothing_to_report(profit_run, tmp_path, caplog, no_drawings):
    models = [write(tmp_path / name, config={"model_type": "qwen3"}) for name in ("one", "two")]
    report = make_report([read_source(path) for path in (models[0], profit_run)])
    assert report.title == "profit" and "nothing to report on in one" in caplog.text
    with pytest.raises(ValueError, match="nothing to report on in one, two"):
        make_report([read_source(path) for path in models])


def test_other_bad_input(profit_run, rl_run, tmp_path, capsys):
    def refused(*argv):
        assert main(["report", *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "There is no folder or file" in refused(tmp_path / "none", "--out", tmp_path / "r.html")
    assert "write report.html" in refused(profit_run, "--out", "report.pdf")
    assert "there is no folder" in refused(profit_run, "--out", tmp_path / "none" / "r.html")
    (rl_run / "completions" / "completions_00002.parquet").write_bytes(b"PAR1 and no more")
    assert "completions_00002.parquet is not a Parquet file" in refused(rl_run, "--out", tmp_path / "r.html")


def test_without_matplotlib_the_remedy_is_told(profit_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(profit_run), "--out", str(tmp_path / "r.html")]) == 2
    assert "A report needs matplotlib. Run `pip install 'hf_rb[report]'`." in capsys.readouterr().err


def test_every_panel_is_listed():
    folder = Path(_tokens.__file__).parent
    assert {file.stem for file in folder.glob("[a-z]*.py")} == {*PANELS, "overview", "environment"}
    assert isinstance(make_report([]), Report)
