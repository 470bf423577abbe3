from dataclasses import dataclass, field
from importlib.metadata import version

import pytest
from huggingface_hub import ModelCard

from hf_rb import PTQTPConfig, __version__
from hf_rb.evaluation import Size
from hf_rb.hub import METHODS, ModelCardData, Result, changed_hyperparameters, render_card, write_model_card


SIZE = Size(123_456, 100_000, 9.87648, 40_000, 3.75)
RESULTS = [Result("exact match", 0.625, "tiny:math", before=0.375), Result("perplexity", 1.5, "tiny:math")]


def full(**changes):
    fields = dict(
        model_name="student-profit-ptqtp",
        methods=["profit", "ptqtp"],
        base_model="HuggingFaceTB/SmolLM2-135M",
        dataset_name="tiny:math",
        trainer="SFTTrainer",
        hyperparameters={"profit_threshold": 0.1},
        results=RESULTS,
        size=SIZE,
        repo_id="me/student",
        tags=["math"],
        license="apache-2.0",
    )
    return ModelCardData(**(fields | changes))


def test_the_hubs_reader_gets_back_what_was_said():
    card = ModelCard(render_card(full()), ignore_metadata_errors=False)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["hf_rb", "profit", "ptqtp", "math"]
    assert card.data.model_name == "student-profit-ptqtp"
    assert [(r.metric_name, r.metric_value, r.dataset_name, r.dataset_split) for r in card.data.eval_results] == [
        ("exact match", 0.625, "tiny:math", "test"),
        ("perplexity", 1.5, "tiny:math", "test"),
    ]
    for entry in card.data.to_dict()["model-index"][0]["results"]:  # what the Hub requires of an entry
        assert entry["task"]["type"] and entry["dataset"]["type"] and entry["dataset"]["name"]
        assert all(metric["type"] and metric["value"] is not None for metric in entry["metrics"])


def test_says_what_a_reader_needs():
    text = render_card(full())
    assert "import hf_rb  # registers the format" in text
    assert 'from_pretrained("me/student")' in text
    assert "| exact match | `tiny:math` | test | 0.375 | 0.625 |" in text
    assert "| perplexity | `tiny:math` | test | – | 1.5 |" in text
    assert "123,456 bytes for 100,000 weights: **9.876 bits per weight**" in text
    assert "log2(9) = 3.17" in text
    assert f"- hf_rb {__version__}" in text and f"- trl {version('trl')}" in text
    for key in ("profit", "ptqtp"):
        assert METHODS[key].paper_url in text and METHODS[key].citation in text


def test_a_bare_card_has_no_holes():
    for data in (
        ModelCardData("student"),
        ModelCardData("student", library_name="peft"),
        full(results=[], size=None, repo_id=None),
    ):
        text = render_card(data)
        assert "None" not in text and "licence" not in text and "\n\n\n" not in text
        assert ("import hf_rb" in text) == ("ptqtp" in data.methods)  # else nothing of ours is needed
        assert f'from_pretrained("path/to/{data.model_name}")' in text
        ModelCard(text, ignore_metadata_errors=False)
    assert "base_model" not in render_card(ModelCardData("student"))


def test_what_the_size_is_about():
    assert "scales and headers included, and the adapter." in render_card(full(adapter="adapter"))
    assert "scales and headers included." in render_card(full())
    summaries = {"ptqtp": PTQTPConfig(planes=1, planes_per_layer={"down_proj": 3}).summary}
    text = render_card(full(summaries=summaries))
    assert "to one ternary plane or a sum of three ternary planes, each" in text and "log2(9)" not in text
    assert PTQTPConfig().summary == METHODS["ptqtp"].summary


def test_an_ordinary_checkpoint_needs_nothing_of_ours():
    text = render_card(full(methods=["profit"], size=None))
    assert "import hf_rb" not in text and "hf_rb @" not in text


def test_an_adapter_loads_through_peft():
    text = render_card(full(methods=["profit"], library_name="peft"))
    assert "AutoPeftModelForCausalLM.from_pretrained" in text and f"- peft {version('peft')}" in text
    assert ModelCard(text).data.library_name == "peft"


def test_local_names_are_neither_linked_nor_published(tmp_path):
    folder = tmp_path / "secret-project" / "student"
    folder.mkdir(parents=True)
    text = render_card(full(base_model=str(folder), dataset_name=str(tmp_path / "data.jsonl")))
    card = ModelCard(text)
    assert card.data.base_model is None and card.data.datasets is None
    assert "secret-project" not in text and str(tmp_path) not in text
    assert "Made from `student` with the data `data.jsonl`" in text


def test_hub_names_are_linked():
    text = render_card(full(dataset_name="openai/gsm8k"))
    assert "[HuggingFaceTB/SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M)" in text
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)" in text
    assert ModelCard(text).data.datasets == "openai/gsm8k"


def test_odd_values_cannot_break_the_card():
    odd = 'a | b\n---\n`c` "d": {{ e }}'
    text = render_card(
        full(model_name=odd, repo_id=odd, hyperparameters={"note": odd}, results=[Result(odd, 1.0, odd)])
    )
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.data.model_name == odd
    assert card.data.eval_results[0].metric_name == odd
    assert "| `note` | `a \\| b --- 'c' \"d\": {{ e }}` |" in text
    assert 'from_pretrained("a | b\\n---' in text


def test_metrics_have_the_names_that_the_hub_compares():
    text = render_card(full(results=[Result("exact match (20 problems)", 0.5, "tiny:math")]))
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_name) == ("exact_match", "exact match (20 problems)")


def test_numbers_that_the_hub_cannot_read_stay_in_the_text():
    text = render_card(full(results=[Result("perplexity", float("inf"), "tiny:math"), RESULTS[0]]))
    assert "| perplexity | `tiny:math` | test | – | inf |" in text
    assert [result.metric_name for result in ModelCard(text).data.eval_results] == ["exact match"]


def test_unknown_names_are_refused():
    listed = ", ".join(METHODS)
    with pytest.raises(ValueError, match=f"no method 'profitt'; the methods are {listed}\\."):
        ModelCardData("student", methods=["profitt"])
    with pytest.raises(ValueError, match="'transformers' or 'peft', not 'hf_rb'"):
        ModelCardData("student", library_name="hf_rb")


def test_write(tmp_path):
    path = write_model_card(tmp_path / "model", full())
    assert path == tmp_path / "model" / "README.md"
    assert path.read_text(encoding="utf-8") == render_card(full())


@dataclass
class Config:
    output_dir: str = "here"
    learning_rate: float = 1e-4
    profit_threshold: float | None = None
    hub_token: str | None = None
    logging_steps: int = 10
    optim_args: list = field(default_factory=list)
    seed: int = 42


def test_changed_hyperparameters():
    config = Config("/home/me", profit_threshold=0.0, hub_token="hf_secret", logging_steps=1)
    assert changed_hyperparameters(config) == {"profit_threshold": 0.0}
    assert changed_hyperparameters(Config(learning_rate=1e-3, optim_args=["a"])) == {
        "learning_rate": 1e-3,
        "optim_args": ["a"],
    }


def test_changed_hyperparameters_of_a_trainer_config(tmp_path):
    from trl import SFTConfig

    config = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-3, max_steps=7, report_to="none"
    )
    config.model_init_kwargs = {"revision": "main", "dtype": "float32"}
    assert changed_hyperparameters(config) == {"learning_rate": 1e-3, "max_steps": 7, "bf16": False}


@pytest.mark.parametrize("method", [one for one in METHODS.values() if one.paper], ids=lambda method: method.key)
def test_every_method_has_a_card_of_its_own(method):
    from hf_rb.io.resources import resource_folder

    text = (resource_folder("model_cards") / f"{method.key}.md").read_text(encoding="utf-8")
    assert method.name in text and method.paper_url in text and method.citation in text
