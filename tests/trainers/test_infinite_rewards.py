"""A reward of infinity is said once, and changes nothing of what TRL does with it."""

import math

import pytest
import torch
import trl

from hf_rb import GRPOConfig, GRPOTrainer, tiny


def overflowing(completions, **_):
    return [math.inf, 1.0] * (len(completions) // 2)


def finite(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize("reward, said", [(overflowing, 1), (finite, 0)])
def test_infinity_is_said_once(student, config, caplog, reward, said):
    args = config | {"num_generations": 2, "max_completion_length": 4, "max_steps": 2, "seed": 3}
    data = tiny.load_dataset("math", config="prompt_only", size=8)
    weights = []
    for trainer, kind in ((GRPOTrainer, GRPOConfig), (trl.GRPOTrainer, trl.GRPOConfig)):
        run = trainer(str(student), [finite, reward], kind(**args), data)
        run.train()
        weights.append(run.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    warnings = [one.message for one in caplog.records if "returned infinity" in one.message]
    assert len(warnings) == said
    if said:
        assert "The reward function overflowing returned infinity at step 0" in warnings[0]
