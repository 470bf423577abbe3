import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

from hf_rb import evaluation, tiny
from hf_rb.tiny.build import build_tokenizer, train


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.path("student"))


def test_resolve():
    assert tiny.resolve("tiny:teacher") == str(tiny.path("teacher"))
    assert tiny.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ValueError, match="tiny:teacher, tiny:student, tiny:moe"):
        tiny.resolve("tiny:techer")


def test_assets_stay_small():
    assert sum(file.stat().st_size for file in tiny.ASSETS.rglob("*") if file.is_file()) < 12e6


def test_hidden_size_meets_a_short_group():
    assert AutoConfig.from_pretrained(tiny.path("teacher")).hidden_size % 128 == 64


def test_one_tokenizer():
    files = {name: (tiny.path(name) / "tokenizer.json").read_bytes() for name in tiny.MODELS}
    assert len(set(files.values())) == 1


def test_tokenizer_is_rebuilt_alike(tokenizer, tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (tiny.path("student") / name).read_bytes()


def test_trl_supports_tool_calling_with_this_tokenizer(tokenizer):
    assert supports_tool_calling(tokenizer)


def test_template_is_prefix_preserving(tokenizer):
    assert is_chat_template_prefix_preserving(tokenizer)


def test_tool_calls_parse_back(tokenizer):
    messages = tiny.load_dataset(config="tools")[0]["messages"]
    call = tokenizer.apply_chat_template(messages[:2], tokenize=False).rpartition("assistant\n")[2]
    parsed = tokenizer.parse_response(call, prefix="")
    assert parsed["tool_calls"][0]["function"] == {
        "name": "search",
        "arguments": messages[1]["tool_calls"][0]["function"]["arguments"],
    }


def test_assistant_mask_covers_the_reply_and_its_end(tokenizer):
    messages = tiny.load_dataset(size=1)[0]["messages"]
    row = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == messages[1]["content"] + "<|im_end|>\n"


def test_every_digit_is_one_token(tokenizer):
    assert tokenizer.tokenize(" 123") == ["Ġ1", "2", "3"]


@pytest.mark.parametrize("config", tiny.CONFIGS)
def test_datasets(config):
    train, test = (tiny.load_dataset(config=config, split=split, size=20) for split in ("train", "test"))
    assert len(train) == len(test) == 20
    expected = {
        "messages": {"messages"},
        "prompt_completion": {"prompt", "completion"},
        "prompt_only": {"prompt"},
        "rubric": {"prompt", "rubric"},
        "tools": {"prompt", "messages", "tools"},
    }[config]
    assert set(train.column_names) == expected | {"answer", "kind"}


def test_tools_column_is_a_json_schema():
    (schema,) = tiny.load_dataset(config="tools", size=1)[0]["tools"]
    assert json.loads(json.dumps(schema))["function"]["name"] == "search"


def test_unknown_names():
    with pytest.raises(ValueError, match="write tiny:math"):
        tiny.load_dataset("maths")
    with pytest.raises(ValueError, match="messages, prompt_completion, prompt_only, rubric, tools"):
        tiny.load_dataset(config="chat")


@pytest.mark.slow
def test_same_seed_same_weights(tokenizer):
    first, second = (train("student", tokenizer, seed=0, budget=20_000).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_shipped_models_meet_their_bars(name):
    model, tokenizer = evaluation.load_model(tiny.path(name))
    problems = evaluation.load_task("tiny:math", 500)
    result = evaluation.exact_match(model, tokenizer, problems, max_new_tokens=96)
    if name == "teacher":
        assert result.accuracy >= 0.90 and min(result.by_kind.values()) >= 0.80
    else:
        assert 0.20 <= result.accuracy <= 0.60
        sampled = evaluation.pass_at_k(model, tokenizer, problems, k=8, samples=8, max_new_tokens=96)
        assert sampled.pass_at_k >= sampled.pass_at_1 + 0.15  # room for RL
