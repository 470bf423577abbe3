import pytest
from helpers.random_models import save_qwen3
from transformers import AutoTokenizer

from hf_rb import SFTConfig, SFTTrainer, tiny
from hf_rb.teachers import LocalTeacher


SIZE = {"intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16, "initializer_range": 0.3}


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a student, and of a teacher that is wider, and whose vocabulary is padded further."""
    folder = tmp_path_factory.mktemp("models")
    student = save_qwen3(folder / "student", 0, hidden_size=32, **SIZE)
    teacher = save_qwen3(folder / "teacher", 1, hidden_size=64, padding=24, **SIZE)
    return {"student": str(student), "teacher": str(teacher)}


@pytest.fixture(scope="session")
def data():
    return tiny.load_dataset("math", config="prompt_completion", size=12)


@pytest.fixture(scope="session")
def make_trainer(models, data, tmp_path_factory):
    """Returns a function that makes a trainer of the student; one with a teacher prepares it, as the distillation trainers do."""

    def make(teacher="local", dataset=data, eval_dataset=None, peft_config=None, **config):
        settings = {
            "output_dir": str(tmp_path_factory.mktemp("run")),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "max_length": 96,
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = SFTTrainer(
            models["student"],
            SFTConfig(**settings | config),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
        )
        trainer.teacher = LocalTeacher(models["teacher"]) if teacher == "local" else teacher
        if trainer.teacher is not None:
            trainer.teacher.prepare(trainer)
        return trainer

    return make


@pytest.fixture(scope="session")
def batches():
    """Returns a function that yields all batches of an epoch, with the mask of their predictions that have a label."""

    def each(trainer):
        for batch in trainer.get_train_dataloader():
            yield batch, batch["labels"][:, 1:] != -100

    return each
