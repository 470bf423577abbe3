import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_rb.ops.backbone import head_of, model_inputs
from hf_rb.teachers import AdapterOffTeacher, CachedTeacher, LocalTeacher, build_teacher


PACKED = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize("config", [{}, PACKED], ids=["padded", "padding-free"])
def test_scores_are_the_model_s_logits(make_trainer, models, batches, config):
    trainer = make_trainer(**config)
    teacher, model = trainer.teacher, AutoModelForCausalLM.from_pretrained(models["teacher"])
    batch, keep = next(batches(trainer))
    # With a cache, transformers does not look for the documents of a packed row.
    logits = model(**model_inputs(batch), use_cache=False).logits.detach()
    assert_close(teacher.logits(batch), logits)
    (part,) = teacher.score(batch, keep)
    assert_close(part.hidden @ part.head.weight.T, logits[:, :-1][keep])
    labels = batch["labels"][:, 1:][keep]
    expected = logits[:, :-1][keep][:, : teacher.vocabulary].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert_close(teacher.log_probs(batch, keep, labels), expected)


def test_packed_scores_are_padded_scores(make_trainer, batches):
    """Also when a mask of ones stands beside the positions, which would let documents see one another."""
    padded, packed = make_trainer(max_length=None), make_trainer(teacher=None, **PACKED)
    by_label = {}
    for batch, keep in batches(padded):
        rows = padded.teacher.score(batch, keep)[0].hidden
        for index, hidden in zip(keep.nonzero(), rows, strict=True):
            row, place = index.tolist()
            by_label[tuple(batch["input_ids"][row, : place + 2].tolist())] = hidden
    for batch, keep in batches(packed):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        rows = padded.teacher.score(batch, keep)[0].hidden
        starts = (batch["position_ids"] == 0).cumsum(-1)
        for index, hidden in zip(keep.nonzero(), rows, strict=True):
            row, place = index.tolist()
            prefix = batch["input_ids"][row, : place + 2][starts[row, : place + 2] == starts[row, place]]
            assert_close(hidden, by_label[tuple(prefix.tolist())], rtol=1e-4, atol=1e-5)


def test_nothing_of_the_teacher_learns(make_trainer, batches):
    trainer = make_trainer()
    model = trainer.teacher.model
    model.train()
    batch, keep = next(batches(trainer))
    (part,) = trainer.teacher.score(batch, keep)
    assert not part.hidden.requires_grad and not part.head.weight.requires_grad and not model.training
    assert not trainer.teacher.logits(batch).requires_grad
    assert not any(weight.requires_grad for weight in model.parameters())
    assert any(weight.requires_grad for weight in trainer.model.parameters())


def test_a_name_keeps_its_dtype_and_takes_init_kwargs(make_trainer, models, batches):
    trainer = make_trainer(teacher=LocalTeacher(models["teacher"], {"dtype": "bfloat16"}))
    assert trainer.teacher.model.dtype == torch.bfloat16
    batch, keep = next(batches(trainer))
    assert trainer.teacher.log_probs(batch, keep, batch["labels"][:, 1:][keep]).isfinite().all()
    with pytest.raises(ValueError, match="loaded already, so that its init kwargs cannot act"):
        LocalTeacher(trainer.model, {"dtype": "bfloat16"})


def test_the_student_cannot_be_its_teacher(make_trainer):
    trainer = make_trainer(teacher=None)
    with pytest.raises(ValueError, match="Teacher and student are the same object"):
        LocalTeacher(trainer.model).prepare(trainer)
    teacher = LocalTeacher(copy.deepcopy(trainer.model))
    teacher.prepare(trainer)
    assert teacher.vocabulary == trainer.model.config.vocab_size


def test_a_teacher_without_tokenizer(make_trainer, models, caplog):
    trainer = make_trainer(teacher=None)
    wide, narrow = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("teacher", "student"))
    wide.config._name_or_path = narrow.config._name_or_path = ""
    with pytest.raises(
        ValueError, match=r"The teacher has 1,048 logits, the student 1,024, and no tokenizer is saved"
    ):
        LocalTeacher(wide).prepare(trainer)
    LocalTeacher(narrow).prepare(trainer)
    assert "No tokenizer is saved with the teacher" in caplog.text
    teacher = LocalTeacher(wide, tokenizer=trainer.processing_class)
    teacher.prepare(trainer)
    assert teacher.vocabulary == 1024


def test_another_tokenizer_is_found_before_weights_are_read(make_trainer, models, tmp_path):
    trainer = make_trainer(teacher=None)
    shutil.copytree(models["teacher"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "tokenizer.json"
    contents = json.loads(path.read_text())
    vocabulary = contents["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=rf"different tokenizers: id {vocabulary[second]} is .*\(2 ids differ\)"):
        LocalTeacher(str(tmp_path)).prepare(trainer)


def test_adapters_off_is_the_base_model(make_trainer, models, batches):
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False
    )
    trainer = make_trainer(teacher=AdapterOffTeacher(), peft_config=lora)
    base = AutoModelForCausalLM.from_pretrained(models["student"])
    batch, keep = next(batches(trainer))
    trainer.model.train()
    trainer.model.base_model.model.lm_head.eval()
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    expected, other = base(**model_inputs(batch)).logits, trainer.model.eval()(**model_inputs(batch)).logits
    trainer.model.train()
    trainer.model.base_model.model.lm_head.eval()
    assert_close(trainer.teacher.logits(batch), expected)
    assert not torch.allclose(expected, other)
    (part,) = trainer.teacher.score(batch, keep)
    assert_close(part.hidden @ part.head.weight.T, expected[:, :-1][keep])
    assert {name: module.training for name, module in trainer.model.named_modules()} == modes
    assert_close(trainer.model.eval()(**model_inputs(batch)).logits, other)


def test_adapters_off_needs_adapters(make_trainer):
    with pytest.raises(ValueError, match="The student has no adapters"):
        make_trainer(teacher=AdapterOffTeacher())


def test_head_reads_what_models_do_to_their_logits(models):
    model = AutoModelForCausalLM.from_pretrained(models["student"])
    model.config.logits_scaling, model.config.final_logit_softcapping = 4.0, 30.0
    head = head_of(model)
    assert (head.scale, head.softcap, head.bias) == (0.25, 30.0, None)
    model.config.logit_scale = 0.5
    assert head_of(model).scale == 0.5


def test_build_teacher(models):
    assert isinstance(build_teacher(teacher_model=models["teacher"]), LocalTeacher)
    assert isinstance(build_teacher(teacher_cache="cache"), CachedTeacher)
    own = AdapterOffTeacher()
    assert build_teacher(teacher=own) is own
    with pytest.raises(ValueError, match="There is no teacher. Set `teacher_model_name_or_path`"):
        build_teacher()
    with pytest.raises(ValueError, match="several teachers: `teacher_model`, `teacher_cache`"):
        build_teacher(teacher_model="a", teacher_cache="b")
