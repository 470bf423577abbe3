"""`GKDTrainer` with TRL's experimental GKD and without it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import trl

from hf_rb import GKDConfig, GKDTrainer, tiny
from hf_rb.trainers.gkd import base, base_config
from hf_rb.utils import compat


RUNS = {
    "on-policy": {"lmbda": 1.0, "max_new_tokens": 8, "loss_impl": "dense"},
    **{f"jsd {beta}": {"lmbda": 0.0, "beta": beta, "loss_impl": "dense"} for beta in (0.0, 0.3, 1.0)},
    "chunked": {"lmbda": 0.0, "beta": 0.3},
}


def numbers(student, config):
    """What two steps of each run log, the loss among it, and a sum over the weights after them."""
    data, found = tiny.load_dataset("math", config="messages", size=8), {}
    for name, changes in RUNS.items():
        args = GKDConfig(**config | changes)
        trainer = GKDTrainer(student, "tiny:teacher", args, train_dataset=data)
        trainer.train()
        logs = [
            {key: entry[key] for key in ("loss", "grad_norm", "kd", "kept_fraction")}
            for entry in trainer.state.log_history[:-1]
        ]
        found[name] = logs, sum(weight.double().sum().item() for weight in trainer.model.parameters())
    return found


@pytest.fixture(scope="module")
def data():
    return tiny.load_dataset("math", config="messages", size=8)


SCRIPT = """
import json, sys
sys.modules["trl.experimental.gkd"] = None
import torch
torch.set_num_threads(1)
from test_gkd_ancestry import numbers
from hf_rb import GKDTrainer
from hf_rb.utils import compat
student, config, output = sys.argv[1:]
found = numbers(student, json.loads(config))
try:
    compat.GKDTrainer
except ImportError:
    json.dump([found, [kind.__name__ for kind in GKDTrainer.__mro__]], open(output, "w"))
"""


def test_without_trl_gkd_the_numbers_are_the_same(student, config, tmp_path, one_thread):
    output = tmp_path / "numbers.json"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(student), json.dumps(config), str(output)],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    found, kinds = json.loads(output.read_text())
    assert kinds.index("GKDFunctions") < kinds.index("SFTTrainer")
    for name, (logs, weights) in numbers(str(student), config).items():
        assert found[name] == [logs, weights], name  # the same operations in the same order


@pytest.mark.parametrize(
    ("module", "name", "parent", "stand_in"),
    [(base, "GKDTrainer", "_Parent", "GKDFunctions"), (base_config, "GKDConfig", "GKDBaseConfig", "GKDArguments")],
    ids=["trainer", "config"],
)
def test_only_an_absent_gkd_module_of_trl_is_replaced(module, name, parent, stand_in, monkeypatch):
    assert vars(module)[parent] is getattr(compat, name)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl.experimental.gkd", None)
        again = runpy.run_path(module.__file__)
    assert again[parent] is again[stand_in]
    # A TRL that has the module and moved the name is no reason to train another class without a word.
    monkeypatch.delattr(compat, name)
    monkeypatch.setitem(compat.TABLE, name, compat.Entry("trl.experimental.gkd", "Moved"))
    with pytest.raises(ImportError, match="`trl.experimental.gkd.Moved`, which trl"):
        runpy.run_path(module.__file__)


@pytest.mark.parametrize("place", ["behind", "before"])
def test_super_reaches_mixins_of_sft_and_those_of_gkd_before(student, config, data, place):
    """A mixin of TRL's SFT trainer is constructed and stepped wherever it stands, one of GKD's where it stands first."""
    seen = []

    class Mixin(trl.SFTTrainer if place == "behind" else compat.GKDTrainer):
        def __init__(self, *args, **kwargs):
            seen.append("made")
            super().__init__(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            seen.append("stepped")
            return super().training_step(*args, **kwargs)

    Both = type("Both", (GKDTrainer, Mixin) if place == "behind" else (Mixin, GKDTrainer), {})

    args = GKDConfig(**config | {"lmbda": 0.0, "max_steps": 1})
    Both(str(student), "tiny:teacher", args, train_dataset=data).train()
    assert seen == ["made", "stepped"]
    assert issubclass(GKDTrainer, compat.GKDTrainer) and issubclass(GKDConfig, compat.GKDConfig)


def test_a_mixin_of_trl_gkd_behind_ours_is_refused():
    class Mixin(compat.GKDTrainer):
        pass

    message = "`Mixin`, a base of `Both`, derives from TRL's GKDTrainer.* Put `Mixin` before hf_rb's GKDTrainer"
    with pytest.raises(TypeError, match=message):
        type("Both", (GKDTrainer, Mixin), {})
