"""Models that let packed sequences see each other are refused at the first packed batch; the others train as before."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.pairwise import pairwise
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM

from hf_rb import GKDConfig, GKDTrainer, SFTConfig, SFTTrainer, tiny
from hf_rb.cli import main
from hf_rb.teachers import LocalTeacher, cache_teacher
from hf_rb.trainers.common import packing


WORKER = Path(__file__).parent / "packing_worker.py"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "llama": SIZES | {"num_attention_heads": 2, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": SIZES | {"num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "mamba": SIZES,
}
APART, MIXED = ("llama", "gpt2"), ("opt", "mamba")
LAYOUTS = {"packing": {"packing": True, "max_length": 256}, "padding_free": {"padding_free": True, "max_length": None}}
REFUSAL = "does not keep the sequences of a packed row apart.*`packing: false`.*`allow_leaking_packing: true`"


@pytest.fixture(scope="module")
def data():
    return tiny.load_dataset("math", config="messages", size=12)


@pytest.fixture
def make(tokenizer, data, config):
    def build(family, seed=0):
        torch.manual_seed(seed)
        ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        fields = FAMILIES[family] | ids | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))

    def make(trainer, family, teacher="llama", model=None, **fields):
        model, peft_config = build(family), fields.pop("peft_config", None)
        fields = config | fields
        common = {
            "train_dataset": data,
            "eval_dataset": data,
            "processing_class": tokenizer,
            "peft_config": peft_config,
        }
        if trainer == "sft":
            return SFTTrainer(model, SFTConfig(**fields), **common)
        teacher = LocalTeacher(build(teacher, seed=1), tokenizer=tokenizer)
        return GKDTrainer(model, args=GKDConfig(lmbda=0.0, **fields), teacher=teacher, **common)

    return make


def trained(trainer):
    trainer.train()
    ignored = ("runtime", "per_second", "step_time")
    logs = [
        {key: value for key, value in entry.items() if not key.endswith(ignored)}
        for entry in trainer.state.log_history
    ]
    return logs, trainer.model.state_dict()


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("trainer", ["sft", "gkd"])
def test_a_model_that_mixes_is_refused(make, trainer, family):
    one = make(trainer, family, **LAYOUTS["packing"])
    name, before = type(one.model).__name__, {key: value.clone() for key, value in one.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} {REFUSAL}"):
        one.train()
    assert one.model.training  # as it was
    with pytest.raises(ValueError, match=f"{name} {REFUSAL}"):  # whoever caught the first is told again
        one.train()
    assert all(torch.equal(value, before[key]) for key, value in one.model.state_dict().items())
    allowed = make(trainer, family, **LAYOUTS["packing"], allow_leaking_packing=True, max_steps=1)
    allowed.train()
    assert allowed.state.global_step == 1


@pairwise(("layout", list(LAYOUTS)), ("family", APART), ("trainer", ["sft", "gkd"]))
def test_a_model_that_separates_trains_as_without_the_check(make, trainer, family, layout):
    logs, weights = trained(make(trainer, family, **LAYOUTS[layout]))
    expected_logs, expected = trained(make(trainer, family, **LAYOUTS[layout], allow_leaking_packing=True))
    assert logs == expected_logs
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_prompt_learning_drops_positions(make):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PEFT drops their `position_ids`.*`allow_leaking_packing: true`"):
        make("sft", "llama", **LAYOUTS["packing"], peft_config=prompt).train()
    one = make("sft", "llama", **LAYOUTS["packing"], peft_config=prompt, allow_leaking_packing=True).model.eval()
    ids, positions = torch.arange(20, 28).unsqueeze(0), torch.tensor([[0, 1, 2, 3] * 2])
    other = torch.cat([ids[:, :4] + 9, ids[:, 4:]], dim=1)
    with torch.no_grad(), pytest.warns(UserWarning, match="Position ids are not supported"):
        packed, changed = (one(input_ids=one_row, position_ids=positions).logits[:, -4:] for one_row in (ids, other))
    assert not torch.allclose(packed, changed)  # the second sequence has seen the first


def test_padding_free_bf16_adapters_and_evaluation_are_checked(make):
    with pytest.raises(ValueError, match=f"OPTForCausalLM {REFUSAL}"):
        make("sft", "opt", **LAYOUTS["padding_free"]).train()
    with pytest.raises(ValueError, match=f"OPTForCausalLM {REFUSAL}"):
        make("sft", "opt", **LAYOUTS["packing"], profit_threshold=0.1).evaluate()
    with pytest.raises(ValueError, match=f"OPTForCausalLM {REFUSAL}"):
        make("gkd", "opt", **LAYOUTS["packing"]).evaluate()
    lora = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match=f"OPTForCausalLM {REFUSAL}"):
        make("gkd", "opt", **LAYOUTS["packing"], loss_impl="dense", peft_config=lora, bf16=True).train()


def test_every_model_that_reads_the_batch_is_checked(make, tmp_path):
    with pytest.raises(ValueError, match=f"OPTForCausalLM {REFUSAL}"):
        make("gkd", "llama", teacher="opt", **LAYOUTS["packing"]).train()
    with pytest.raises(ValueError, match=f"OPTForCausalLM {REFUSAL}"):
        cache_teacher(make("gkd", "llama", teacher="opt", **LAYOUTS["packing"]), tmp_path / "cache", k=4)
    allowed = make("gkd", "llama", teacher="opt", **LAYOUTS["packing"], allow_leaking_packing=True)
    cache_teacher(allowed, tmp_path / "cache", k=4)


def test_padded_rows_and_wrapped_packing_are_not_checked(make, monkeypatch):
    monkeypatch.setattr(packing, "measure_leak", None)  # would raise
    make("sft", "opt").train()
    make("sft", "opt", packing=True, packing_strategy="wrapped", max_length=64).train()
    make("sft", "opt", **LAYOUTS["packing"], eval_packing=False, allow_leaking_packing=True).train()


def test_the_check_costs_one_pass_over_a_packed_batch_a_run(make, monkeypatch):
    tokens, checks, measure = [], [], packing.measure_leak

    def counting(model, *args, **kwargs):
        handle = model.base_model.register_forward_hook(
            lambda module, args, kwargs, output: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        checks.append(None)
        try:
            return measure(model, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(packing, "measure_leak", counting)
    trainer = make("sft", "llama", **LAYOUTS["packing"], max_steps=3)
    trainer.train()
    trainer.evaluate()
    (batch, alone) = tokens
    assert len(checks) == 1 and alone[0] * alone[1] < batch[0] * batch[1]


def test_a_recipe_may_say_it(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: tiny:student\ndataset_name: tiny:math\ndataset_config: messages\noutput_dir: run\n"
        "packing: true\nallow_leaking_packing: maybe\n"
    )
    assert main(["check", str(recipe)]) == 2
    assert "`allow_leaking_packing` must be bool" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("maybe", "true"))
    assert main(["check", str(recipe)]) == 0
    recipe.write_text(
        recipe.read_text().replace("packing: true\nallow_leaking_packing", "eval_packing: true\nallow_leaking_packing")
    )
    assert main(["check", str(recipe)]) == 0
    recipe.write_text(recipe.read_text().replace("allow_leaking_packing: true", ""))
    assert main(["check", str(recipe)]) == 2
    assert "keeps no positions" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_refuse_together(tmp_path):
    """One of them has a batch that is not packed, and runs the same passes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, WORKER, str(tmp_path)], check=True, timeout=300, env=environment)
    one, other = ((tmp_path / f"result-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert one == other
    for line in (one[0], one[2]):
        assert "OPTForCausalLM does not keep the sequences of a packed row apart" in line
    assert [line.split(": ")[1] for line in (one[1], one[3])] == ["trained 2"] * 2


@pytest.mark.parametrize("config", [SFTConfig, GKDConfig])
def test_packed_evaluation_of_an_unpacked_run_is_refused(config):
    run = {
        "output_dir": "run",
        "use_cpu": True,
        "bf16": False,
        "eval_packing": True,
        **({"lmbda": 0.0} if config is GKDConfig else {}),
    }
    with pytest.raises(ValueError, match="`eval_packing: true` without `packing: true`.*Set `packing: true`"):
        config(**run)
    for fields in ({"packing": True}, {"packing_strategy": "wrapped"}, {"allow_leaking_packing": True}):
        config(**run, **fields)


def test_the_field_of_each_config():
    with pytest.raises(ValueError, match="`allow_leaking_packing` must be True or False"):
        SFTConfig("run", allow_leaking_packing=2, use_cpu=True, bf16=False)
    assert not GKDConfig("run", use_cpu=True, bf16=False).allow_leaking_packing


@pytest.mark.parametrize("kind", ["cp_enabled", "sp_enabled"])
def test_sequences_that_processes_share_are_not_checked(kind):
    """The shard of the second process begins inside a sequence, and no process alone can tell packed rows."""
    parallelism = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, kind: True})
    trainer = SimpleNamespace(
        args=SimpleNamespace(allow_leaking_packing=False), accelerator=SimpleNamespace(parallelism_config=parallelism)
    )
    positions = torch.tensor([[4, 5, 0, 1]])
    packing.check_packing(trainer, torch.nn.Identity(), {"input_ids": positions, "position_ids": positions})


def test_a_batch_without_positions_is_not_checked():
    trainer = SimpleNamespace(args=SimpleNamespace(allow_leaking_packing=False))  # asked for no more
    packing.check_packing(trainer, torch.nn.Identity(), {"input_ids": torch.tensor([[4, 5]])})
