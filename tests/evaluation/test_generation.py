import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_rb import tiny
from hf_rb.evaluation import exact_match, generate, generation, is_correct, load_task, pass_at_k
from hf_rb.evaluation.generation import Completion


PROMPTS = ["There are 7 red cups", "Ava", "Finally 20 - 12 = 8 and there are 3 boxes with 4 pens each."]


def test_batched_greedy_equals_one_prompt_at_a_time(model, tokenizer):
    batched = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    for prompt, completions in zip(PROMPTS, batched, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(ids[0, len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
        assert [completion.text for completion in completions] == [expected]


def test_the_models_own_generation_config_does_not_leak_in(model, tokenizer, monkeypatch):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    for name, value in {"do_sample": True, "repetition_penalty": 2.0, "temperature": 0.1, "top_k": 1}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected


def test_a_mixture_as_trl_saves_it(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny.resolve("tiny:moe"))
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    model.config.output_router_logits = True
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=4) == expected


def test_sampling_is_seeded_and_leaves_global_randomness_alone(model, tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    runs = [generate(model, tokenizer, PROMPTS, 8, samples=4, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.rand(1) == expected
    assert runs[0] == runs[1] != runs[2]
    assert all(len(samples) == 4 for samples in runs[0])
    assert len(set(runs[0][0])) > 1


def test_conversations_go_through_the_chat_template(model, tokenizer):
    conversation = [{"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert generate(model, tokenizer, [conversation], 4) == generate(model, tokenizer, [text], 4)


def test_refusals(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="temperature=1.0"):
        generate(model, tokenizer, PROMPTS, samples=2)
    with pytest.raises(ValueError, match="write samples=8"):
        pass_at_k(model, tokenizer, [], k=8, samples=4)
    with pytest.raises(ValueError, match="no rows"):
        exact_match(model, tokenizer, [])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, tokenizer, [[{"role": "user", "content": "How many?"}]])


def answering(monkeypatch, answers):
    """Replaces generation: the prompts are keys of `answers`."""
    monkeypatch.setattr(
        generation,
        "generate",
        lambda model, tokenizer, prompts, *args: [[Completion(t, True) for t in answers[p]] for p in prompts],
    )


def test_exact_match_counts(monkeypatch):
    answering(monkeypatch, {"a": ["So 3. #### 3"], "b": ["#### 4"], "c": ["it is 5"], "d": ["#### 6\n"]})
    rows = [
        {"prompt": p, "answer": a, "kind": k}
        for p, a, k in [("a", "3", "x"), ("b", "3", "x"), ("c", "5", "y"), ("d", "6", "y")]
    ]
    result = exact_match(None, None, rows)
    assert (result.accuracy, result.lenient_accuracy, result.count, result.finished) == (0.5, 0.75, 4, 1)
    assert result.by_kind == {"x": 0.5, "y": 0.5}
    assert result.correct == [True, False, False, True]
    assert result.completions[2] == "it is 5"
    assert json.dumps(result.__dict__)


def test_pass_at_k_is_the_unbiased_estimate(monkeypatch):
    answering(monkeypatch, {"a": ["#### 3", "#### 3", "#### 1", "#### 2"], "b": ["#### 1"] * 4})
    result = pass_at_k(None, None, [{"prompt": "a", "answer": "3"}, {"prompt": "b", "answer": "3"}], k=2, samples=4)
    assert result.pass_at_1 == 0.25
    assert result.pass_at_k == pytest.approx((1 - 1 / 6 + 0) / 2)  # of 6 pairs, one holds no right answer


@pytest.mark.parametrize(
    ("text", "answer", "strict", "lenient"),
    [
        ("12 - 4 = 8. #### 8", "8", True, True),
        ("#### 7 #### 8", "8", True, True),
        ("#### 1,080", "1080", True, True),
        ("#### $18.00", "18", True, True),
        ("#### 18.", "18", True, True),
        ("#### -3", "-3", True, True),
        ("#### 80", "8", False, False),
        ("the answer is 8", "8", False, True),
        ("the answer is 1,080.", "1080", False, True),
        ("8 #### 9", "8", False, False),
        ("####", "8", False, False),
        ("", "8", False, False),
        ("#### Paris", "paris", True, True),
    ],
)
def test_is_correct(text, answer, strict, lenient):
    assert (is_correct(text, answer), is_correct(text, answer, lenient=True)) == (strict, lenient)


def test_tiny_task():
    rows = load_task("tiny:math", limit=20)
    assert len(rows) == 20
    assert all(is_correct(row["solution"], row["answer"]) for row in rows)
    assert {"prompt", "solution", "answer", "kind"} == rows[0].keys()


def test_gsm8k_file(tmp_path):
    file = tmp_path / "gsm.jsonl"
    file.write_text(
        '{"question": "2 + 2?", "answer": "2 + 2 = 4\\n#### 4"}\n\n{"question": "?", "answer": "#### 1,000"}\n'
    )
    rows = load_task(str(file))
    assert [(row["prompt"][0]["content"], row["answer"], row["kind"]) for row in rows] == [
        ("2 + 2?", "4", "gsm"),
        ("?", "1,000", "gsm"),
    ]
    assert len(load_task(str(file), limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "2 + 2?"}', "line 1 has prompt: expected the columns question and answer"),
        ('["a"]', "line 1 has list: expected the columns"),
        ('{"question": "?", "answer": "#### 4"}\n{oops', "line 2 is not JSON"),
        ('{"question": "?", "answer": 4}', "does not end in `#### <answer>`"),
        ('{"question": "?", "answer": "four"}', "does not end in `#### <answer>`"),
        ("", "holds no problems"),
    ],
)
def test_bad_task_files(tmp_path, content, message):
    file = tmp_path / "task.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(file))


def test_missing_tasks(tmp_path):
    with pytest.raises(FileNotFoundError, match="no task file"):
        load_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="write tiny:math"):
        load_task("tiny:maths")
    with pytest.raises(ValueError, match="limit=0"):
        load_task("tiny:math", limit=0)
