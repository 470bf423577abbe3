"""Students, teachers and references with LM heads of other kinds, through the trainers: the loss is that of their own logits."""

import logging

import pytest
import torch
import transformers
from helpers.tiny_zoo import build_tiny
from peft import PromptTuningConfig
from transformers import AutoTokenizer

from hf_rb import (
    DistillationConfig,
    DistillationTrainer,
    GKDConfig,
    GKDTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
    tiny,
)
from hf_rb.ops.logit_source import LogitSource
from hf_rb.teachers import CachedTeacher, cache_teacher
from hf_rb.trainers.audit import audit


NAMES = {
    "gemma2": "Gemma2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "modernbert": "ModernBertDecoderForCausalLM",
    "xlstm": "xLSTMForCausalLM",
}
ODD = ("modernbert", "xlstm")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with the embedded tokenizer, some of which cap logits that are large enough to feel it."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    fields = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    fields |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    for name, kind in NAMES.items():
        caps = {"final_logit_softcapping|output_logit_soft_cap": 3.0}
        model = build_tiny(getattr(transformers, kind), **fields, **caps)
        with torch.no_grad():
            model.get_output_embeddings().weight *= 8
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def gkd(models, config):
    def make(student, teacher, **flags):
        return GKDTrainer(
            str(models / student),
            None if teacher is None else str(models / teacher),
            GKDConfig(**(config | {"lmbda": 0.0, "max_steps": 1, "max_new_tokens": 6} | flags)),
            train_dataset=tiny.load_dataset("math", config="prompt_completion", size=4),
        )

    return make


def first_step(trainer):
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return entry["loss"], entry["grad_norm"]


CASES = {
    ("modernbert", "gemma2"): {"objective": "forward_kl", "kd_alpha": 0.9},
    ("xlstm", "llama"): {"objective": "jsd", "beta": 0.3},
    ("gemma2", "xlstm"): {"objective": "akl"},
    ("llama", "modernbert"): {"objective": "hpd"},
    ("gemma2", "llama"): {"objective": "reverse_kl"},
}


@pytest.mark.parametrize("pair, flags", CASES.items(), ids="-".join)
def test_gkd_chunked_is_dense(gkd, caplog, monkeypatch, pair, flags):
    expected = first_step(gkd(*pair, loss_impl="dense", **flags))
    assert "not its last hidden states" not in caplog.text
    with caplog.at_level(logging.WARNING):
        actual = first_step(gkd(*pair, **flags))
    assert actual == pytest.approx(expected, rel=1e-4)
    said = [record.message for record in caplog.records if "not its last hidden states" in record.message]
    assert len(said) == sum(name in ODD for name in pair)
    if said:
        monkeypatch.setattr(LogitSource, "is_head", lambda self, model: True)
        assert first_step(gkd(*pair, **flags))[0] != pytest.approx(expected[0], rel=1e-3)


def assert_dense(comparisons):
    for comparison in comparisons:
        assert max(comparison.loss, comparison.gradient) < 1e-4, comparison


@pytest.mark.parametrize("reward_scale, full", [(1.25, False), (1.25, True)])
def test_reference_and_student_of_gopd(gkd, reward_scale, full):
    flags = {"objective": "gopd", "lmbda": 1.0, "temperature": 1.0, "reward_scale": reward_scale}
    assert_dense(audit(gkd("modernbert", "llama", gopd_full_vocab=full, **flags), batches=1))


def test_cache(gkd, tmp_path):
    """Of a teacher with another head, and read by a student with another."""
    captured = gkd("xlstm", "modernbert", objective="forward_kl")
    cache_teacher(captured, tmp_path / "cache", k=8)
    trainer = gkd("xlstm", None, objective="forward_kl", teacher_cache=str(tmp_path / "cache"))
    assert isinstance(trainer.teacher, CachedTeacher)
    comparisons = audit(trainer, batches=1, captured=captured.teacher)
    assert "cache of all tokens" in [comparison.path for comparison in comparisons]
    assert_dense(comparisons)


DISTILLATION = {
    "student, TRL's loss": (("modernbert", "gemma2"), {"objective": "jsd", "beta": 0.3}),
    "teacher, TRL's loss": (("gemma2", "modernbert"), {"objective": "jsd"}),
    "akl": (("modernbert", "modernbert"), {"objective": "akl"}),
    "gopd": (("modernbert", "llama"), {"objective": "gopd", "reward_scale": 1.25}),
    "routed": (("llama", {"a": "modernbert", "b": "gemma2"}), {"objective": "gopd", "gopd_teacher_column": "kind"}),
}


@pytest.mark.parametrize("pair, flags", DISTILLATION.values(), ids=DISTILLATION)
def test_distillation_trainer(models, config, pair, flags):
    student, teacher = pair
    is_routed = isinstance(teacher, dict)
    data = tiny.load_dataset("math", config="prompt_only", size=4)
    data = data.remove_columns("kind").add_column("kind", ["a", "b", "a", "a"])
    trainer = DistillationTrainer(
        str(models / student),
        {key: str(models / name) for key, name in teacher.items()} if is_routed else str(models / teacher),
        DistillationConfig(**(config | {"max_completion_length": 6, "max_steps": 1} | flags)),
        data,
    )
    assert (trainer.teacher_model is not None) == (flags["objective"] == "jsd")
    trainer.train()
    if flags["objective"] == "jsd":
        with pytest.raises(ValueError, match="are not its last hidden states .* while the dataset has images"):
            trainer._can_be_trl(trainer.model, {"pixel_values": None})
    assert_dense(audit(trainer, batches=1))


def test_distillation_with_usual_heads_is_trls(models, config, caplog):
    args = DistillationConfig(**(config | {"max_completion_length": 6, "max_steps": 1}))
    data = tiny.load_dataset("math", config="prompt_only", size=4)
    trainer = DistillationTrainer(str(models / "llama"), str(models / "gemma2"), args, data)
    called = []
    trainer._our_loss = called.append
    trainer.train()
    assert not called and "not its last hidden states" not in caplog.text


def test_profit_reads_no_wrong_probabilities(models, config):
    """TRL's loss, which ProFit gates, takes logits for hidden states times LM head. Without the flag it is TRL's to say so."""
    config |= {"max_steps": 1}
    data = tiny.load_dataset("math", config="prompt_completion", size=4)

    def train(name, **flags):
        SFTTrainer(str(models / name), SFTConfig(**config | flags), train_dataset=data).train()

    train("gemma2", profit_threshold=1e-3)
    train("modernbert")
    with pytest.raises(
        ValueError, match="the logits of ModernBertDecoderForCausalLM are not that: .* without `profit_threshold`"
    ):
        train("modernbert", profit_threshold=1e-3)


ANSWERS = {
    "sft": (SFTTrainer, SFTConfig, "prompt_completion", {}),
    "grpo": (GRPOTrainer, GRPOConfig, "prompt_only", {"num_generations": 2, "max_completion_length": 4}),
}


@pytest.mark.parametrize("trainer", ANSWERS)
@pytest.mark.parametrize("name, peft", [("gemma2", None), ("modernbert", None), ("llama", "prompt")])
def test_trls_fused_head_on_another_head_is_named(models, config, caplog, trainer, name, peft):
    """TRL's loss multiplies hidden states by the head. One warning says where that is not the model, and no number changes."""
    kind, args, layout, flags = ANSWERS[trainer]
    if trainer == "grpo":
        flags = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions], **flags}
    functions = {key: value for key, value in flags.items() if key == "reward_funcs"}
    if peft is not None:
        functions["peft_config"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    flags = {key: value for key, value in flags.items() if key not in functions}
    data = tiny.load_dataset("math", config=layout, size=4)
    with caplog.at_level(logging.WARNING):
        kind(
            str(models / name), args=args(**config | {"max_steps": 2} | flags), train_dataset=data, **functions
        ).train()
    said = [record.message for record in caplog.records if "The run goes on as TRL's does" in record.message]
    assert len(said) == (name in ODD)
