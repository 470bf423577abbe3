import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import set_seed
from trl.experimental.utils import DataCollatorForChatML

from hf_rb import GKDConfig, GKDTrainer, tiny
from hf_rb.teachers import AdapterOffTeacher, CachedTeacher, LocalTeacher
from hf_rb.trainers.gkd.data import prompts_of


FORMATS = ("messages", "prompt_completion", "prompt_only")


@pytest.fixture(scope="module")
def data():
    return {name: tiny.load_dataset("math", config=name, size=16) for name in FORMATS}


@pytest.fixture(scope="module")
def teacher(student):
    """The random student with other weights."""
    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(student)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def make(student, teacher, config, data, tokenizer):
    """Returns a function that makes a trainer."""

    def make(dataset=None, eval_dataset=None, model=None, trainer_kwargs=None, **flags):
        kwargs = {"teacher": LocalTeacher(teacher, tokenizer=tokenizer)} | (trainer_kwargs or {})
        return GKDTrainer(
            model or str(student),
            args=GKDConfig(**(config | {"lmbda": 0.0, "max_new_tokens": 8} | flags)),
            train_dataset=data["messages"] if dataset is None else dataset,
            eval_dataset=eval_dataset,
            **{key: value for key, value in kwargs.items() if value is not None},
        )

    return make


# Configuration


# Data


def rows_of(trainer, dataset=None):
    return [(row["input_ids"], row["labels"]) for row in (dataset or trainer.train_dataset)]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And twice that, in naïve words – 日本?"},
    {"role": "assistant", "content": "  Eight: 8 日本"},
]


def test_messages_are_labelled_as_trls_collator_does(make, data, tokenizer):
    dataset = Dataset.from_list([*data["messages"].select_columns("messages"), {"messages": TURNS}])
    trainer = make(dataset, shuffle_dataset=False)
    collator = DataCollatorForChatML(tokenizer=tokenizer, max_length=1024)
    for example, row in zip(dataset, trainer.train_dataset, strict=True):
        expected = collator([example])
        assert row["input_ids"] == expected["input_ids"][0].tolist()
        assert row["labels"] == expected["labels"][0].tolist()
        assert prompts_of(trainer.data_collator([row]))[0].tolist() == expected["prompts"][0].tolist()


def test_other_layouts_are_labelled_alike(make, data, tokenizer):
    last = rows_of(make(Dataset.from_list([{"messages": TURNS}])))
    sharegpt = [{"from": turn["role"], "value": turn["content"]} for turn in TURNS]
    assert rows_of(make(Dataset.from_list([{"conversations": sharegpt}]))) == last
    assert rows_of(make(Dataset.from_list([{"prompt": TURNS[:-1], "completion": TURNS[-1:]}]))) == last
    assert rows_of(make(Dataset.from_list([dict(zip(("input_ids", "labels"), last[0], strict=True))]))) == last

    both = rows_of(make(Dataset.from_list([{"messages": TURNS}]), assistant_only_loss=True))
    assert both[0][0] == last[0][0]
    more = [new for new, old in zip(both[0][1], last[0][1], strict=True) if new != old]
    assert tokenizer.decode(more).startswith("4")
    everything = rows_of(make(Dataset.from_list([{"messages": TURNS}]), completion_only_loss=False))
    assert everything[0][1] == last[0][0]
    text = rows_of(make(Dataset.from_list([{"text": "One and one is two."}])))
    assert text[0][0] == text[0][1]


DATA_ERRORS = {
    "prompts without completions": ([{"prompt": TURNS[:2]}], {}, "Add a column `completion`, or set `lmbda: 1.0`"),
    "nothing left": ([{"messages": TURNS}], {"max_length": 8}, "Raise `max_length`"),
    "empty completions": (
        [{"prompt": TURNS[:2], "completion": TURNS[2:3]}, {"prompt": TURNS[:2], "completion": []}],
        {},
        "An example has a prompt and an empty `completion`",
    ),
    "all labels masked": (
        [{"input_ids": [5, 6, 7], "labels": [-100] * 3}],
        {},
        "No example of the train dataset has a",
    ),
    "last turn": ([{"messages": TURNS[:4]}], {}, "must be the assistant's; one is user"),
}


@pytest.mark.parametrize("rows, flags, message", DATA_ERRORS.values(), ids=DATA_ERRORS)
def test_data_without_completions_is_refused(make, rows, flags, message):
    with pytest.raises(ValueError, match=message):
        make(Dataset.from_list(rows), **flags)


def test_text_cannot_be_sampled_from(make):
    trainer = make(Dataset.from_list([{"text": "One and one is two."}] * 4), lmbda=1.0)
    with pytest.raises(ValueError, match="no prompt to sample a completion of"):
        trainer.train()


# Training

RUNS = {
    "messages": ("messages", {}),
    "prompts and completions, packed": ("prompt_completion", {"packing": True, "max_length": 256}),
    "assistant turns, wrapped": (
        "messages",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 128, "assistant_only_loss": True},
    ),
    "bfloat16, checkpointing": ("messages", {"bf16": True, "gradient_checkpointing": True, "objective": "hpd"}),
    "seq_kd": ("messages", {"seq_kd": True, "objective": "hpd"}),
    "on-policy, prompts only": ("prompt_only", {"lmbda": 1.0, "objective": "akl"}),
    "exopd, checkpointing": (
        "prompt_only",
        {
            "lmbda": 1.0,
            "objective": "gopd",
            "temperature": 1.0,
            "reward_scale": 1.25,
            "gradient_checkpointing": True,
        },
    ),
}


@pytest.mark.parametrize("name, flags", RUNS.values(), ids=RUNS)
def test_trains_and_evaluates(make, data, name, flags):
    trainer = make(data[name], data[name].select(range(6)), per_device_eval_batch_size=4, **flags)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history[:2])
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_entropy", "eval_kept_fraction"} <= metrics.keys()
    if flags.get("objective") != "gopd":
        assert min(metrics[f"eval_{name}"] for name in ("ce", "forward_kl", "reverse_kl")) > 0


def test_bfloat16_agrees_with_float32(make):
    """Autocast must reach the backbone, which is not run by the model's own forward."""
    losses = {}
    for bf16 in (False, True):
        trainer = make(bf16=bf16, objective="reverse_kl", max_steps=1)
        kinds = set()
        trainer.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *x, k=kinds: k.add(x[2].dtype))
        trainer.train()
        losses[bf16] = trainer.state.log_history[0]["loss"]
        assert kinds == {torch.bfloat16 if bf16 else torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_evaluation_is_the_objective_over_the_evaluation_data(make, data, student, teacher):
    rows = data["messages"].select(range(4))
    trainer = make(eval_dataset=rows, objective="forward_kl", kd_alpha=0.7, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    model, keep = AutoModelForCausalLM.from_pretrained(student), batch["labels"][:, 1:] != -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    log_q, log_p = (m(**inputs).logits[:, :-1][keep].log_softmax(-1) for m in (model, teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    ce = torch.nn.functional.nll_loss(log_q, batch["labels"][:, 1:][keep]).item()
    assert metrics["eval_forward_kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["eval_ce"] == pytest.approx(ce, rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(0.3 * ce + 0.7 * kl, rel=1e-4)


# Who gets a gradient


def test_the_teacher_stays_as_it_is(make, teacher):
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(objective="akl")
    trainer.train()
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_the_student_without_adapters_as_teacher_starts_at_zero(make):
    trainer = make(
        objective="reverse_kl", trainer_kwargs={"teacher": AdapterOffTeacher(), "peft_config": LoraConfig(r=4)}
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)


# Sampling


def test_the_source_of_completions_follows_seed_and_step(make, teacher):
    trainer = make(lmbda=0.3, seq_kd=True)
    trainer.model_wrapped = trainer.model

    def writers():
        sequence = []
        for trainer.state.global_step in range(400):
            sequence.append(trainer._writer() is trainer.model)
        return sequence

    first = writers()
    torch.rand(3)
    assert writers() == first  # of no generator's state
    assert 0.22 < sum(first) / 400 < 0.38
    trainer.args.seed += 1
    assert writers() != first
    assert trainer.teacher.model is not trainer.model
    trainer.args.lmbda, trainer.seq_kd, trainer.args.seq_kd = 0.0, False, False
    assert trainer._writer() is None


def test_samples_end_at_a_stop_token_and_are_the_only_labels(make, data, tokenizer):
    trainer = make(data["prompt_only"], lmbda=1.0, max_new_tokens=200, temperature=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    state = torch.get_rng_state()
    sampled = trainer._with_completions(batch, trainer.model)
    assert torch.equal(torch.get_rng_state(), state)
    again = trainer._with_completions(batch, trainer.model)
    assert all(torch.equal(sampled[key], again[key]) for key in sampled)
    stops = set(trainer.generation_config.eos_token_id)
    assert tokenizer.eos_token_id in stops
    for ids, labels, mask in zip(*(sampled[key] for key in ("input_ids", "labels", "attention_mask")), strict=True):
        length = int(mask.sum())
        start = int((labels != -100).int().argmax())
        assert tokenizer.decode(ids[:start]).endswith("<|im_start|>assistant\n")
        assert torch.equal(labels[start:length], ids[start:length])
        assert not (labels[length:] != -100).any() and mask[:length].all()
        completion = ids[start:length].tolist()
        assert not stops & set(completion[:-1])
        assert completion[-1] in stops or len(completion) == 200


def test_the_loss_is_divided_by_what_was_sampled(make, data, monkeypatch):
    """TRL's trainer counts the labels of the dataset."""
    trainer = make(data["messages"], lmbda=1.0, objective="reverse_kl", gradient_accumulation_steps=2, max_steps=1)
    counts = []
    original = trainer.compute_loss

    def spy(model, inputs, return_outputs=False, num_items_in_batch=None):
        counts.append((int((inputs["labels"][:, 1:] != -100).sum()), int(num_items_in_batch)))
        return original(model, inputs, return_outputs, num_items_in_batch)

    monkeypatch.setattr(trainer, "compute_loss", spy)
    trainer.train()
    assert counts[0][1] == counts[1][1] == counts[0][0] + counts[1][0]
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["reverse_kl"], rel=1e-5)


# What may not reach the weights


class Excluding(LocalTeacher):
    """A teacher that excludes a token at every position."""

    def prepare(self, trainer):
        super().prepare(trainer)
        head = torch.nn.Linear(*reversed(self.model.lm_head.weight.shape))
        head.weight.data.copy_(self.model.lm_head.weight)
        head.bias.data.zero_()[5] = -torch.inf
        self.model.set_output_embeddings(head.requires_grad_(False))


@pytest.mark.parametrize("impl", ["chunked", "dense"])
@pytest.mark.parametrize("objective", ["reverse_kl", "akl", "forward_kl", "hpd"])
def test_a_teacher_that_excludes_tokens(make, student, teacher, tokenizer, objective, impl):
    excluding = Excluding(copy.deepcopy(teacher), tokenizer=tokenizer)
    trainer = make(objective=objective, loss_impl=impl, max_steps=1, trainer_kwargs={"teacher": excluding})
    if objective in ("forward_kl", "hpd"):
        trainer.train()
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
        return
    with pytest.raises(ValueError, match=f"`objective: {objective}` gave a loss of (inf|nan) at step 0"):
        trainer.train()
    before = AutoModelForCausalLM.from_pretrained(student).state_dict()
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["chunked", "dense"])
@pytest.mark.parametrize("objective", ["jsd", "akl", "hpd"])
def test_nothing_to_train_on_is_zero(make, objective, impl):
    trainer = make(objective=objective, loss_impl=impl)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for number in (None, torch.tensor(0)):
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=number)
        loss.backward()
        assert loss.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in trainer.model.parameters())


def test_labels_outside_the_shared_vocabulary_are_left_out(make, student, teacher, tokenizer):
    """A student padded further than the teacher, and labels that only it has."""
    wide = AutoModelForCausalLM.from_pretrained(student)
    wide.resize_token_embeddings(len(tokenizer) + 16, mean_resizing=False)
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}] * 4
    outside = [{**rows[0], "labels": [-100, 6, len(tokenizer) + 3, 8, 9]}] * 4
    masked = [{**rows[0], "labels": [-100, 6, -100, 8, 9]}] * 4
    logs = []
    for dataset in (outside, masked):
        trainer = make(Dataset.from_list(dataset), model=copy.deepcopy(wide), max_steps=1, objective="hpd")
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["outside_vocabulary_fraction"] == 0.25 and logs[1]["outside_vocabulary_fraction"] == 0
    assert logs[0]["loss"] == logs[1]["loss"] and logs[0]["kept_fraction"] == 0.6


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("padding", [{"model": 16}, {"teacher": 16, "model": 16}], ids=["teacher", "reference"])
def test_models_are_compared_on_the_ids_of_the_narrowest(make, student, teacher, tokenizer, padding, full):
    start = AutoModelForCausalLM.from_pretrained(student)
    models = {"model": start, "teacher": teacher, "reference_model": start}
    results = []
    for impl in ("chunked", "dense"):
        of = {}
        for name, model in models.items():
            of[name] = copy.deepcopy(model)
            torch.manual_seed(0)
            of[name].resize_token_embeddings(len(tokenizer) + padding.get(name, 0), mean_resizing=False)
        trainer = make(
            model=of["model"],
            trainer_kwargs={
                "teacher": LocalTeacher(of["teacher"], tokenizer=tokenizer),
                # None: the student at its start, as wide as the student.
                "reference_model": of["reference_model"] if "teacher" in padding else None,
            },
            **{"objective": "gopd", "reward_scale": 1.25, "gopd_full_vocab": full, "lmbda": 1.0, "temperature": 1.0},
            **{"loss_impl": impl, "max_steps": 1},
        )
        trainer.train()
        results.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


# Refusals of the trainer


def test_teachers_are_one(student, config, data, teacher):
    args = GKDConfig(**config)
    with pytest.raises(ValueError, match="There is no teacher"):
        GKDTrainer(str(student), args=args, train_dataset=data["messages"])
    with pytest.raises(ValueError, match="There are several teachers"):
        GKDTrainer(str(student), teacher, args, train_dataset=data["messages"], teacher=LocalTeacher(teacher))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "Set `objective: akl` or `objective: forward_kl`"),
        ({"objective": "akl", "lmbda": 0.5}, "`teacher_cache` needs `lmbda: 0.0`"),
        ({"objective": "akl", "loss_impl": "dense"}, "Set `loss_impl: chunked`"),
        ({"objective": "akl", "seq_kd": True}, "Set `seq_kd: false`"),
    ],
)
def test_a_cached_teacher_as_an_object_obeys_the_same_rules(make, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        make(trainer_kwargs={"teacher": CachedTeacher(tmp_path)}, **flags)


def test_a_teacher_that_cannot_write_is_refused_with_seq_kd(make):
    lora = {"teacher": AdapterOffTeacher(), "peft_config": LoraConfig(r=4)}
    with pytest.raises(ValueError, match="which AdapterOffTeacher cannot"):
        make(trainer_kwargs=lora, seq_kd=True)


def test_teacher_by_name_as_in_trl(student, config, data):
    args = GKDConfig(**config, teacher_model_name_or_path=str(student), lmbda=0.0)
    trainer = GKDTrainer(str(student), args=args, train_dataset=data["messages"])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert isinstance(trainer, trl.experimental.gkd.GKDTrainer)
    assert trainer.teacher_model is not trainer.model


def test_a_reference_that_cannot_act_is_refused(make, student):
    with pytest.raises(ValueError, match="`reference_model` acts with `objective: gopd`"):
        make(trainer_kwargs={"reference_model": str(student)})


def test_a_loss_function_is_refused(make):
    with pytest.raises(ValueError, match="would replace the loss that `objective` names"):
        make(trainer_kwargs={"compute_loss_func": lambda *_, **__: 0})


def test_another_chat_template_of_the_teacher_is_mentioned(make, teacher, tokenizer, caplog):
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    for theirs, count in ((other, 1), (tokenizer, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make(trainer_kwargs={"teacher": LocalTeacher(copy.deepcopy(teacher), tokenizer=theirs)})
        assert caplog.text.count("different chat templates") == count


def test_images_and_cut_sequences_are_refused(make, monkeypatch):
    trainer = make()
    parallelism = SimpleNamespace(cp_enabled=True, sp_enabled=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "parallelism_config", parallelism)
        with pytest.raises(
            ValueError, match="GKDTrainer does not support context or sequence parallelism.*`cp_size: 1`"
        ):
            trainer._check_supported()
    trainer._is_vision_dataset = True
    with pytest.raises(ValueError, match="Remove the image columns"):
        trainer._check_supported()


def test_a_prompt_learning_adapter_is_refused(make):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="virtual tokens shift the labels"):
        make(trainer_kwargs={"peft_config": config})


def test_a_conversation_without_a_prompt_is_named(make):
    """TRL's `apply_chat_template` has an IndexError for it."""
    answer = {"role": "assistant", "content": "Hello, how may I help?"}
    message = "no turn before the assistant's 'Hello, how may I help\\?'.*Put a user's turn before it, or remove"
    good = [{"role": "user", "content": "Hi"}, answer]
    for rows in (
        [{"messages": good}, {"messages": [answer]}],
        [{"prompt": good[:1], "completion": [answer]}, {"prompt": [], "completion": [answer]}],
        [{"conversations": [{"from": "assistant", "value": answer["content"]}]}],
    ):
        with pytest.raises(ValueError, match=message):
            make(Dataset.from_list(rows))
    with pytest.raises(ValueError, match="no turn before the assistant's ''"):
        make(Dataset.from_list([{"prompt": good[:1]}, {"prompt": []}]), lmbda=1.0)
    make(Dataset.from_list([{"messages": [answer]}]), assistant_only_loss=True)


def test_stop_tokens_are_those_of_the_model_in_its_order(make, student):
    model = AutoModelForCausalLM.from_pretrained(student)
    model.generation_config.eos_token_id = [7, 3, 2]
    assert make(model=model).generation_config.eos_token_id == [7, 3, 2]
