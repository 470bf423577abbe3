"""A model whose logits are not its hidden states times its head trains the same on one process and on two."""

import head_cases
import pytest
import torch
from gkd_cases import TRAINER


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    head_cases.save_models(folder)
    return folder


def test_processes_agree(models, in_two_processes, monkeypatch):
    results = in_two_processes("head_cases")
    monkeypatch.setattr(TRAINER, "models", models)
    for name in head_cases.ROWS:
        logs, weights, *_ = TRAINER.train_row(TRAINER.rows[name])
        actual_logs, actual_weights = results[name]
        assert actual_logs[0]["loss"] == pytest.approx(logs[0]["loss"], rel=5e-5)
        assert actual_logs[0]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=5e-5)
        torch.testing.assert_close(actual_weights, weights, rtol=1e-4, atol=1e-6)
    assert results["outcome"] == [False, False]
    is_head, distance = results["LlamaForCausalLM"]
    assert is_head and distance < 1e-5
    is_head, distance = results["ModernBertDecoderForCausalLM"]
    assert not is_head and distance < 1e-5
