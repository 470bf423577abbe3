"""The check of EDAS that can fail: wrong answers of a bandit policy stay more diverse than under GRPO, by what the formula says."""

import importlib.util
from pathlib import Path

import pytest
import torch


PATH = Path(__file__).parents[2] / "benchmarks" / "edas_bandit.py"
PAPER = {"alpha": 0.4, "beta": 0.3}


@pytest.fixture(scope="module")
def bandit():
    spec = importlib.util.spec_from_file_location("edas_bandit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(3))
def test_wrong_answers_stay_more_diverse(bandit, seed):
    plain, shaped = bandit.sampled(seed), bandit.sampled(seed, **PAPER)
    assert bandit.wrong_entropy(bandit.start(bandit.SKEWED, 0.2)) < plain < shaped
    assert shaped - plain == pytest.approx(bandit.predicted(**PAPER) - bandit.predicted(), rel=0.3)


def test_the_formula_predicts_the_setting(bandit):
    counts, logits = bandit.groups_of(16, 6), bandit.start(bandit.SKEWED, 0.2)
    assert len(counts) == 20349 and (counts.sum(1) == 16).all() and (counts >= 0).all()
    plain, shaped = bandit.drift(logits, counts), bandit.drift(logits, counts, alpha=0.4)
    fall = (plain[2] - plain[1]).item()  # of the log-ratio of the common wrong answer to a rare one
    assert fall == pytest.approx(0.4 * 6 / 11, rel=0.1)
    assert (shaped[2] - shaped[1]).item() / fall == pytest.approx(1.11, abs=0.01)


def test_equal_frequencies_leave_nothing_to_do(bandit):
    shares = {"shares": bandit.EQUAL}
    assert bandit.predicted(**PAPER, **shares) == pytest.approx(bandit.predicted(**shares), abs=1e-9)
    assert torch.tensor([bandit.sampled(0, **PAPER, **shares), bandit.sampled(0, **shares)]).diff().abs() < 1e-3
