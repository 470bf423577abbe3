import copy
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.distillation_trainer as trls
from datasets import Dataset
from helpers.fake_vllm import fake_vllm, log_probs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import set_seed

from hf_rb import DistillationConfig, DistillationTrainer, GKDConfig, tiny
from hf_rb.teachers import AdapterOffTeacher, LocalTeacher
from hf_rb.trainers.common.generation import SamplerLogProbs
from hf_rb.trainers.common.gopd import RoutedTeacher, start_reference


EXOPD = {"objective": "gopd", "reward_scale": 1.25}
PLAIN = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def teacher(student, tmp_path_factory):
    """Folder of the random student with other weights."""
    folder = tmp_path_factory.mktemp("models") / "random-teacher"
    model = AutoModelForCausalLM.from_pretrained(student)
    set_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(student).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data():
    rows = tiny.load_dataset("math", config="prompt_only", size=8).to_list()
    return Dataset.from_list(
        [{"prompt": row["prompt"], "domain": "code" if index % 3 == 0 else "math"} for index, row in enumerate(rows)]
    )


def completion_of(prompt):
    return [5 + sum(prompt) % 90, *prompt[3 : 3 + len(prompt) % 5]]


class Injected(DistillationTrainer):
    """Takes given completions in place of sampling any."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [completion_of(prompt) for prompt in prompt_ids]


@pytest.fixture
def make(student, teacher, data, config):
    def make(flags=EXOPD, model=student, teacher_model=teacher, trainer=Injected, dataset=data, **kwargs):
        args = DistillationConfig(**{**config, "max_completion_length": 8, "shuffle_dataset": False, **flags})
        model, teacher_model = (
            str(part) if isinstance(part, type(student)) else part for part in (model, teacher_model)
        )
        return trainer(model, teacher_model, args, dataset, **kwargs)

    return make


def generation_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_of(trainer, batch):
    """Loss and gradient of one batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradient = {name: part.grad for name, part in trainer.model.named_parameters() if part.grad is not None}
    return loss.item(), gradient


# The reference


def test_reference_is_the_student_at_its_start(make, student):
    """The copy stays behind when the student moves, has no gradient and no dropout, and is what its path gives."""
    trainer = make()
    start = {name: part.clone() for name, part in trainer.model.state_dict().items()}
    trainer.train()
    frozen = [trainer.reference.model, trainer.teacher.model]
    assert not any(part.requires_grad or part.grad is not None for model in frozen for part in model.parameters())
    assert not any(model.training for model in frozen)
    torch.testing.assert_close(dict(trainer.reference.model.state_dict()), start, rtol=0, atol=0)
    assert any(not torch.equal(part, start[name]) for name, part in trainer.model.state_dict().items())
    named = make({**EXOPD, "reference_model_name_or_path": str(student)})
    named.train()
    for entry, expected in zip(named.state.log_history[:2], trainer.state.log_history[:2], strict=True):
        assert entry["loss"] == expected["loss"]
        assert entry["gopd/reward"] == expected["gopd/reward"]


def test_lora_without_adapters_is_the_reference(make, student):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    flags = {**EXOPD, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 1e3}
    trainer = make(flags, peft_config=lora)
    assert isinstance(trainer.reference, AdapterOffTeacher)  # no copy
    base = {name: part.clone() for name, part in trainer.model.state_dict().items() if "lora" not in name}
    trainer.train()
    assert {name for name, part in trainer.model.named_parameters() if part.requires_grad} == {
        name for name, _ in trainer.model.named_parameters() if "lora" in name
    }
    for name, part in base.items():
        torch.testing.assert_close(trainer.model.state_dict()[name], part, rtol=0, atol=0)
    assert any(part.any() for name, part in trainer.model.named_parameters() if "lora_B" in name)

    # The adapters act now, and the reference is still the start.
    batch = generation_batch(trainer)
    tokens, _ = trainer._score(batch, batch["completion_mask"].bool())
    start = make({**EXOPD, "reference_model_name_or_path": str(student)})
    expected, _ = start._score(batch, batch["completion_mask"].bool())
    torch.testing.assert_close(tokens["reference_logp"], expected["reference_logp"])
    assert trainer.model.training


def test_adapters_that_act_are_no_start(make, student):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(student), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    with pytest.raises(ValueError, match="the adapters given here already change the model"):
        make(model=model, processing_class=AutoTokenizer.from_pretrained(student))


def test_a_student_in_parts_cannot_be_copied(student):
    model = AutoModelForCausalLM.from_pretrained(student).to("meta")
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    with pytest.raises(
        ValueError, match="does not have all of the student.* set `reference_model_name_or_path` to the model"
    ):
        start_reference(trainer)


def test_a_scale_of_1_needs_no_reference(make):
    assert make({"objective": "gopd"}).reference is None


def test_objectives_but_gopd_at_another_scale_take_no_reference(make, teacher):
    for flags in ({"objective": "gopd"}, {"objective": "akl"}, {}):
        with pytest.raises(
            ValueError, match="`reference_model` acts with `objective: gopd` and a `reward_scale` other"
        ):
            make(flags, reference_model=str(teacher))
    with pytest.raises(ValueError, match="two references"):
        make({**EXOPD, "reference_model_name_or_path": str(teacher)}, reference_model=str(teacher))


# What the teacher reads


@pytest.fixture(scope="module")
def foreign(teacher, tmp_path_factory):
    """The teacher with a chat template of its own."""
    folder = tmp_path_factory.mktemp("models") / "foreign"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("reference", [None, "student"])
def test_the_teacher_reads_prompts_in_its_own_template(make, foreign, student, data, reference):
    """So does a reference that is given; the student's start reads what the student reads."""
    flags = EXOPD if reference is None else {**EXOPD, "reference_model_name_or_path": str(student)}
    trainer = make(flags, teacher_model=foreign)
    batch = generation_batch(trainer)
    mask = batch["completion_mask"].bool()
    tokens, _ = trainer._score(batch, mask)
    teacher, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (foreign, student))
    tokenizer, own = (AutoTokenizer.from_pretrained(folder) for folder in (foreign, student))
    expected, expected_reference = [], []
    for row in range(len(mask)):
        completion = batch["completion_ids"][row][mask[row]].tolist()
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        text = own.decode(prompt)
        (message,) = [
            one["prompt"]
            for one in data
            if own.apply_chat_template(one["prompt"], add_generation_prompt=True, tokenize=False) == text
        ]
        rendered = tokenizer(tokenizer.apply_chat_template(message, tokenize=False))["input_ids"]
        assert rendered != prompt
        expected.append(log_probs(teacher, rendered, completion))
        expected_reference.append(log_probs(start, rendered if reference else prompt, completion))
    torch.testing.assert_close(tokens["teacher_logp"], torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens["reference_logp"], torch.cat(expected_reference), rtol=1e-4, atol=1e-4)


def test_the_same_template_is_rendered_once(make):
    assert "teacher_prompt_ids" not in generation_batch(make())


def test_each_teacher_has_its_template_and_its_examples(make, teacher, foreign):
    """Routed scores are those of each teacher alone on its rows."""
    flags = {**EXOPD, "per_device_train_batch_size": 8}
    trainer = make(
        {**flags, "gopd_teacher_column": "domain"}, teacher_model={"code": str(foreign), "math": str(teacher)}
    )
    batch = generation_batch(trainer)
    mask, route = batch["completion_mask"].bool(), batch["route"]
    assert sorted(route.tolist()) == [0, 0, 0, 1, 1, 1, 1, 1]
    routed = trainer._score(batch, mask)[0]["teacher_logp"]
    of_token = route[:, None].expand_as(mask)[mask]
    for index, folder in enumerate((foreign, teacher)):
        alone = make(flags, teacher_model=folder)
        unrouted = {key: value for key, value in batch.items() if key != "route"}
        expected = alone._score(unrouted, mask)[0]["teacher_logp"]
        torch.testing.assert_close(routed[of_token == index], expected[of_token == index], rtol=1e-4, atol=1e-4)
    for row, index in enumerate(route):
        prompt, rendered = (
            batch[key][row][batch[mask_key][row].bool()].tolist()
            for key, mask_key in (("prompt_ids", "prompt_mask"), ("teacher_prompt_ids", "teacher_prompt_mask"))
        )
        assert (prompt == rendered) == (index == 1)


def test_an_unknown_teacher_raises(make, teacher, data):
    flags = {**EXOPD, "gopd_teacher_column": "domain"}
    trainer = make(flags, teacher_model={"math": str(teacher), "law": str(teacher)})
    with pytest.raises(ValueError, match="an example has 'code'. The teachers are 'math', 'law'"):
        generation_batch(trainer)


# Importance weights


@pytest.mark.parametrize("cap, weight", [(5.0, 0.5), (1.2, 0.5)])
def test_truncated_importance_weights(make, monkeypatch, cap, weight):
    fake_vllm(monkeypatch, completion_of)
    flags = {**EXOPD, "use_vllm": True, "gopd_aggregation": "token-mean"}
    plain, capped = (
        make(flags, trainer=DistillationTrainer),
        make({**flags, "gopd_tis_cap": cap}, trainer=DistillationTrainer),
    )
    batch = generation_batch(capped)
    mask = batch["completion_mask"].bool()
    sampler = batch["sampler_logp"][mask]
    assert sampler.isnan().sum() == 1
    assert capped.state.global_step == 0
    tokens, _ = capped._score(batch, mask)
    student = copy.deepcopy(capped.model)
    weights = torch.where(sampler.isnan(), 1.0, torch.tensor(weight).exp().clamp(max=cap))
    loss, _ = loss_of(capped, batch)
    unweighted = {key: value for key, value in batch.items() if key != "sampler_logp"}
    plain_loss, _ = loss_of(plain, unweighted)
    advantage = _advantages(plain, unweighted, mask, student)
    assert plain_loss == pytest.approx(-advantage.mean().item(), rel=1e-4, abs=1e-5)
    assert loss == pytest.approx(-(weights * advantage).mean().item(), rel=1e-3, abs=1e-5)
    assert tokens.keys() == {"labels", "teacher_logp", "reference_logp", "sampler_logp"}


def _advantages(trainer, batch, mask, student):
    tokens, _ = trainer._score(batch, mask)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = student(ids, attention_mask=attention).logits[:, -mask.shape[1] - 1 : -1]
    log_q = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0][mask]
    return 1.25 * (tokens["teacher_logp"] - tokens["reference_logp"]) - (log_q - tokens["reference_logp"])


def test_sampler_log_probs_of_several_turns():
    """Prompt, first turn, tool, second turn cut short; another completion of the same prompt goes another way."""

    class Generation:
        logprobs = None
        answers = iter(
            [
                ([[4, 5], [4, 6]], [[[-0.1], [-0.2]], [[-0.3], [-0.4]]]),
                ([[7, 8, 9]], [[[-0.5], [-0.6], [-0.7]]]),
            ]
        )

        def generate(self, prompts, **kwargs):
            completions, values = next(self.answers)
            return prompts, completions, values, None

    generation = Generation()
    sampler = SamplerLogProbs(generation)
    assert generation.logprobs == 0
    generation.generate(prompts=[[1, 2], [1, 2]], num_generations=1)
    generation.generate(prompts=[[1, 2, 4, 5, 3, 3]], num_generations=1)
    first, second = sampler.collect([([1, 2], [4, 5, 3, 3, 7, 8]), ([1, 2], [4, 6])])
    nan = float("nan")
    assert first == pytest.approx([-0.1, -0.2, nan, nan, -0.5, -0.6], nan_ok=True)
    # The first token is that of both: the same token after the same context.
    assert second[1:] == [-0.4]
    assert sampler.collect([([1, 2], [4])])[0] == pytest.approx(
        [nan], nan_ok=True
    )  # nothing is left of the last batch


def test_a_sampler_without_log_probs_is_refused():
    class Generation:
        def generate(self, prompts, **kwargs):
            return prompts, [[4]], None, None

    generation = Generation()
    SamplerLogProbs(generation)
    with pytest.raises(ValueError, match="vLLM has reported none"):
        generation.generate(prompts=[[1, 2]])


# Masks


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum"])
def test_tool_tokens_and_padding_count_nowhere(make, aggregation):
    trainer = make({**EXOPD, "gopd_aggregation": aggregation})
    batch = generation_batch(trainer)
    mask = batch["completion_mask"].clone()
    tool_mask = torch.ones_like(mask)
    tool_mask[:, 0] = 0
    tool_mask[0] = 0  # a completion of which nothing is trained on
    trained = (mask * tool_mask).bool()
    batch |= {
        "tool_mask": tool_mask,
        "num_items_in_batch": trained.sum(),
        "num_sequences_in_batch": trained.any(1).sum(),
    }
    advantage = torch.zeros(mask.shape)
    advantage[trained] = _advantages(trainer, batch, trained, copy.deepcopy(trainer.model)).detach()
    lengths = trained.sum(1)
    expected = {
        "seq-mean-token-mean": (advantage.sum(1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum(),
        "token-mean": advantage.sum() / lengths.sum(),
        "seq-mean-token-sum": advantage.sum() / (lengths > 0).sum(),
    }[aggregation]
    loss, gradient = loss_of(trainer, batch)
    assert loss == pytest.approx(-expected.item(), rel=1e-4, abs=1e-5)

    wider = {
        **batch,
        "completion_ids": torch.nn.functional.pad(batch["completion_ids"], (0, 3)),
        **{key: torch.nn.functional.pad(batch[key], (0, 3)) for key in ("completion_mask", "tool_mask")},
    }
    wider_loss, wider_gradient = loss_of(trainer, wider)
    assert wider_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(wider_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags", [EXOPD, {**EXOPD, "gopd_full_vocab": True}, {"objective": "akl"}])
def test_nothing_to_train_on_is_a_finite_zero(make, flags):
    trainer = make(flags)
    batch = generation_batch(trainer)
    batch |= {"tool_mask": torch.zeros_like(batch["completion_mask"]), "num_items_in_batch": torch.tensor(0)}
    if "num_sequences_in_batch" in batch:
        batch["num_sequences_in_batch"] = torch.tensor(0)
    loss, gradient = loss_of(trainer, batch)
    assert loss == 0
    assert all(not part.any() for part in gradient.values())


def test_evaluation(make, data):
    trainer = make({**EXOPD, "per_device_eval_batch_size": 4}, eval_dataset=data)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_gopd/advantage", "eval_gopd/reward", "eval_entropy"} <= metrics.keys()
    # The mean of 2 batches of 4, each a mean over its completions.
    batches = [trainer._generate_and_score_completions(list(data)[start : start + 4]) for start in (0, 4)]
    means = []
    for batch in batches:
        mask = batch["completion_mask"].bool()
        advantage = torch.zeros(mask.shape)
        advantage[mask] = _advantages(trainer, batch, mask, trainer.model).detach()
        means.append((advantage.sum(1) / mask.sum(1)).mean())
    assert metrics["eval_loss"] == pytest.approx(-torch.stack(means).mean().item(), rel=1e-4, abs=1e-5)


# Refusals


def test_what_only_gkd_can_do(config, student):
    with pytest.raises(TypeError, match="Use `GKDTrainer`"):
        DistillationTrainer(str(student), str(student), GKDConfig(**config))
    assert "objective" in inspect.signature(DistillationConfig).parameters
    copy.deepcopy(DistillationConfig(**config))


def test_images_are_refused(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(trls.DistillationTrainer, "_generate_and_score_completions", lambda *_: {"num_images": [1]})
    with pytest.raises(ValueError, match="`objective: gopd` reads text, and the dataset has images"):
        trainer._generate_and_score_completions([])


def test_teachers_that_are_refused(make, student, teacher):
    with pytest.raises(ValueError, match="There is no teacher. Set `teacher_model_name_or_path`"):
        make(teacher_model=None)
    with pytest.raises(ValueError, match="several teachers: `teacher`, `teacher_model`. Keep one"):
        make(teacher=LocalTeacher(str(teacher)))
    with pytest.raises(ValueError, match="`gopd_teacher_column: domain` names the column that chooses"):
        make({**EXOPD, "gopd_teacher_column": "domain"})
    with pytest.raises(ValueError, match="`gopd_teacher_column: None` names the column that chooses"):
        make(teacher_model={"a": str(teacher), "b": str(teacher)})
    with pytest.raises(TypeError, match="knows what it has stored, and the student's completions are new"):
        make(teacher_model=None, teacher=object())


def test_teacher_from_the_config_or_as_an_object(make, teacher):
    named = make({**EXOPD, "teacher_model_name_or_path": str(teacher)}, teacher_model=None)
    given = make(teacher_model=None, teacher=LocalTeacher(str(teacher)))
    batch = generation_batch(named)
    assert loss_of(named, batch)[0] == loss_of(given, batch)[0]


def test_a_teacher_with_another_tokenizer_is_refused(make, teacher, tmp_path):
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{min(vocabulary['0'], vocabulary['1'])}"):
        make(teacher_model=tmp_path)


@pytest.fixture
def padded(student):
    """The random student with 16 ids more, which stand for no token, and which it likes."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.resize_token_embeddings(model.config.vocab_size + 16, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-16:] *= 20
    return model


@pytest.mark.parametrize("flags", [{}, {"objective": "akl"}, EXOPD])
def test_ids_that_a_narrower_teacher_lacks_are_not_sampled(make, padded, teacher, student, flags):
    processing_class = AutoTokenizer.from_pretrained(student)
    trainer = make(flags, model=padded, trainer=DistillationTrainer, processing_class=processing_class)
    shared = trainer.teacher.vocabulary
    assert shared == AutoModelForCausalLM.from_pretrained(teacher).config.vocab_size
    assert generation_batch(trainer)["completion_ids"].max() < shared
    trainer.train()
    trainer.generation_config.suppress_tokens = None
    assert (
        padded.generate(torch.ones(8, 1, dtype=torch.long), generation_config=trainer.generation_config).max()
        >= shared
    )


def test_an_id_that_the_teacher_lacks_is_refused(make, padded, teacher, student):
    """As vLLM may sample it."""

    class Padding(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return [[self.teacher.vocabulary + 3] for _ in prompt_ids]

    trainer = make(model=padded, trainer=Padding, processing_class=AutoTokenizer.from_pretrained(student))
    with pytest.raises(
        ValueError, match=r"written the id 1027, and .* share 1,024.*`resize_token_embeddings\(1024\)`"
    ):
        generation_batch(trainer)


@pytest.mark.parametrize("objective", ["reverse_kl", "gopd", "jsd"])
def test_a_teacher_that_excludes_tokens_stops_the_run(make, student, teacher, objective):
    """The loss of `jsd` is TRL's own."""
    model = AutoModelForCausalLM.from_pretrained(student if objective == "jsd" else teacher)
    bias = torch.zeros(model.config.vocab_size)
    bias[5:95] = -torch.inf  # among them the first token of every completion
    model.lm_head.bias = torch.nn.Parameter(bias)
    trainer = make({"objective": objective}, teacher_model=model)
    assert (trainer.teacher_model is not None) == (objective == "jsd")
    with pytest.raises(ValueError, match=f"`objective: {objective}` gave a loss of (inf|nan)"):
        trainer.train()
    assert all(part.isfinite().all() for part in trainer.model.parameters())


def test_routing_skips_absent_teachers():
    """A teacher without a row runs only where processes must stay in step."""

    class Counted:
        vocabulary, calls = 9, 0

        def prepare(self, trainer):
            pass

        def log_probs(self, inputs, keep, ids):
            self.calls += 1
            return -ids.float()

    class Place:
        is_deepspeed_enabled = is_fsdp_enabled = False

    for in_step in (False, True):
        one, two = Counted(), Counted()
        routed, place = RoutedTeacher({"one": one, "two": two}), Place()
        place.is_fsdp_enabled = in_step
        routed.prepare(place)
        inputs = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "route": torch.tensor([1, 1])}
        keep = torch.tensor([[False, True, True], [False, False, True]])
        assert routed.log_probs(inputs, keep, torch.tensor([3, 4, 5])).tolist() == [-3, -4, -5]
        assert (one.calls, two.calls) == (int(in_step), 1)
        assert routed.vocabulary == 9


def test_tools(make):
    """What a tool has said is read and not trained on, through the parent's own loop of calls."""

    def double(number: int) -> int:
        """
        Doubles a number.

        Args:
            number: The number.
        """
        return 2 * number

    class Calling(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            answers = ['<tool_call>\n{"name": "double", "arguments": {"number": 4}}\n</tool_call>', "It is 8."]
            is_answer = "<tool_response>" in self.processing_class.decode(prompt_ids[0])
            ids = self.processing_class(answers[is_answer] + "<|im_end|>")["input_ids"]
            return [ids for _ in prompt_ids]

    flags = {**EXOPD, "max_completion_length": 64, "gopd_aggregation": "token-mean"}
    trainer = make(flags, trainer=Calling, tools=[double])
    batch = generation_batch(trainer)
    text = trainer.processing_class.decode(batch["completion_ids"][0])
    assert "8" in text[text.index("<tool_response>") : text.index("</tool_response>")]
    trained = batch["completion_ids"][0][(batch["completion_mask"] * batch["tool_mask"])[0].bool()]
    assert trainer.processing_class.decode(trained) == (
        '<tool_call>\n{"name": "double", "arguments": {"number": 4}}\n</tool_call><|im_end|>It is 8.<|im_end|>'
    )
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    advantage = _advantages(trainer, batch, mask, copy.deepcopy(trainer.model))
    assert loss_of(trainer, batch)[0] == pytest.approx(-advantage.mean().item(), rel=1e-4, abs=1e-5)
