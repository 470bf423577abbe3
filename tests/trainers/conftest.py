import pytest
from helpers.random_models import save_qwen3

from hf_rb import tiny


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """Folder of a random Qwen3 with the embedded tokenizer; labels get probabilities on both sides of 0.001."""
    return save_qwen3(tmp_path_factory.mktemp("models") / "random-student")


@pytest.fixture
def config(tmp_path):
    """Keyword arguments of a short run on the CPU."""
    return {
        "output_dir": str(tmp_path / "output"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@pytest.fixture
def small_embedded(student, monkeypatch, tmp_path):
    """The embedded names, standing for a random model and a few rows; outputs go to a temporary folder."""
    monkeypatch.setattr(tiny, "path", lambda name: student)
    monkeypatch.setitem(tiny.SIZES, "train", 16)
    monkeypatch.setitem(tiny.SIZES, "test", 8)
    monkeypatch.chdir(tmp_path)
