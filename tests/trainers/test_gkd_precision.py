"""Half precision changes neither the objective nor whether a run works: bfloat16 teachers, autocast, and caches."""

import pytest
import torch
from helpers.pairwise import pairwise
from transformers import AutoModelForCausalLM

from hf_rb import GKDConfig, GKDTrainer, tiny
from hf_rb.ops.wide_head import wide_heads
from hf_rb.teachers import CachedTeacher, LocalTeacher, cache_teacher


def load(folder, scale=1.0, dtype=torch.float32):
    """A random model; its logits are of the size of a trained one's, where bfloat16 has steps of 1/16 and more."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= scale
    return model.to(dtype)


@pytest.fixture
def make(student, tokenizer, config):
    def make(teacher=None, teacher_dtype=torch.bfloat16, model=None, **fields):
        teacher = teacher or LocalTeacher(load(student, 2.5, teacher_dtype), tokenizer=tokenizer)
        return GKDTrainer(
            load(student, 2.0) if model is None else model,
            args=GKDConfig(
                **config | {"lmbda": 0.0, "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9} | fields
            ),
            train_dataset=tiny.load_dataset("math", config="messages", size=8),
            processing_class=tokenizer,
            teacher=teacher,
        )

    return make


OBJECTIVES = {
    "hpd": {"objective": "hpd"},
    "forward_kl": {"objective": "forward_kl"},
    "reverse_kl": {"objective": "reverse_kl"},
    "akl, mixed": {"objective": "akl", "kd_alpha": 0.5},
    "jsd, loca": {"loca_alpha": 0.9},
    "exopd": {"objective": "gopd", "lmbda": 1.0, "temperature": 1.0, "reward_scale": 1.25, "max_new_tokens": 8},
}


def loss_and_gradient(trainer):
    """The logged loss and gradient norm of one step, which changes nothing."""
    trainer.train()
    return tuple(trainer.state.log_history[0][name] for name in ("loss", "grad_norm"))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32 student", "autocast"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunked_is_dense_with_a_bfloat16_teacher(make, name, bf16):
    """Float32 from the hidden states on, in both: what is left is the order of sums, 1e-6, which cancellation makes 1e-5."""
    chunked, dense = (
        loss_and_gradient(make(loss_impl=impl, bf16=bf16, **OBJECTIVES[name])) for impl in ("chunked", "dense")
    )
    assert dense[0] == pytest.approx(chunked[0], rel=1e-4, abs=1e-5)
    # The backbone's backward pass is in bfloat16 under autocast: its products round what they are given by up to 2**-9.
    assert dense[1] == pytest.approx(chunked[1], rel=0.01 if bf16 else 1e-4)


def test_hpd_loss_of_a_bfloat16_teacher_is_that_in_float32(make, student, tokenizer):
    """The reference: the same weights, rounded to bfloat16, in a float32 model fed with the bfloat16 backbone's hidden states."""
    rounded = load(student, 2.5, torch.bfloat16)
    losses = [loss_and_gradient(make(loss_impl=impl, objective="hpd"))[0] for impl in ("chunked", "dense")]
    trainer = make(objective="hpd")
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        hidden = rounded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        expected = hidden.double() @ rounded.lm_head.weight.double().T
        with wide_heads(rounded):
            wide = rounded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        narrow = rounded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert wide.dtype == torch.float32 and (wide - expected).abs().max() < 1e-4
    assert narrow.dtype == torch.bfloat16 and (narrow - expected).abs().max() > 0.01  # what rounding did before
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dense_jsd_alone_is_trl_s_with_its_rounding(make):
    """Everywhere else the two agree; the help of `loss_impl` says so."""
    chunked, dense = (loss_and_gradient(make(loss_impl=impl))[0] for impl in ("chunked", "dense"))
    assert dense != pytest.approx(chunked, rel=1e-5)
    chunked, dense = (
        loss_and_gradient(make(loss_impl=impl, teacher_dtype=torch.float32))[0] for impl in ("chunked", "dense")
    )
    assert dense == pytest.approx(chunked, rel=1e-5)


def test_heads_are_as_they_were_afterwards(student):
    model = load(student, dtype=torch.bfloat16)
    forward, bias = model.lm_head.forward, torch.nn.Linear(64, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError), wide_heads(model, model):
        assert model(torch.tensor([[5]])).logits.dtype == torch.float32
        raise RuntimeError
    assert "forward" not in model.lm_head.__dict__ and model.lm_head.forward == forward
    assert model(torch.tensor([[5]])).logits.dtype == torch.bfloat16
    model.set_output_embeddings(bias)
    model.lm_head.forward = replaced = bias.forward
    hidden = torch.randn(2, 64, dtype=torch.bfloat16)
    with wide_heads(model):
        expected = hidden.float() @ bias.weight.float().T + bias.bias.float()
        torch.testing.assert_close(model.lm_head(hidden), expected)
    assert model.lm_head.__dict__["forward"] is replaced


@pytest.fixture(scope="module")
def cache(student, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    args = GKDConfig(
        str(folder / "run"), lmbda=0.0, use_cpu=True, bf16=True, gradient_checkpointing=False, disable_tqdm=True
    )
    teacher = LocalTeacher(load(student, 2.5), tokenizer=tokenizer)
    data = tiny.load_dataset("math", config="messages", size=8)
    trainer = GKDTrainer(load(student), args=args, train_dataset=data, processing_class=tokenizer, teacher=teacher)
    cache_teacher(trainer, folder / "cache", k=16)  # float16, the default
    return folder / "cache"


@pairwise(
    ("objective", ["forward_kl", "akl"]),
    ("mixed", [{}, {"kd_alpha": 0.5}]),
    ("corrected", [{}, {"loca_alpha": 0.9}]),
)
def test_training_from_a_float16_cache_under_autocast(make, cache, objective, mixed, corrected):
    """On a CPU, autocast refuses to put float16 tensors together; half the run in bfloat16 is close to all of it in float32."""
    losses = []
    for bf16 in (True, False):
        trainer = make(teacher=CachedTeacher(cache), bf16=bf16, objective=objective, **mixed, **corrected)
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
        losses.append(trainer.state.log_history[0]["loss"])
    # Logits near 20 that come from hidden states in bfloat16: each is off by up to 20 · 2**-8, and so is a log-probability.
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
