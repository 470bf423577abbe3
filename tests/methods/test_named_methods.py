"""Methods with their flags in a recipe, ours and those of other packages, through every door."""

import copy
import pickle

import pytest
import yaml
from helpers.plugins import install

from hf_rb import GKDConfig, GRPOConfig
from hf_rb.cli import main
from hf_rb.cli.check import check
from hf_rb.io.resources import resource_folder
from hf_rb.methods.recipes import flatten
from hf_rb.scripts import grpo


BREVITY = """
from dataclasses import dataclass

from hf_rb.advantages import SequenceShaper, Shaped
from hf_rb.methods import ShaperMethod, flag


@dataclass
class BrevityFlags:
    brevity_alpha: float = flag(0.1, "Strength.", range="[0, 1]")


class Brevity(SequenceShaper):
    method = ShaperMethod(key="brevity", name="Brevity", summary="Prefers short.", flags=BrevityFlags)

    @classmethod
    def from_config(cls, args, trainer):
        shaper = cls()
        shaper.alpha = args.brevity_alpha
        return shaper

    def shape(self, ctx, advantages):
        return Shaped(advantages * (1 - self.alpha))
"""
START = {"use_cpu": True, "bf16": False, "report_to": "none", "num_generations": 4, "per_device_train_batch_size": 4}
EDAS = {**START, "correct_reward": "exact_answer_reward"}


@pytest.fixture
def brevity(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path / "site", "brevity-pkg", BREVITY, shaper={"brevity": "Brevity"})


def test_flat_recipe_stays_as_it_is():
    recipe = {"objective": "akl", "advantage_shapers": ["edas"], "akl_mu": 0.3, "other": {"a": 1}}
    assert flatten(recipe) == recipe


def test_mapping_becomes_names_and_fields():
    assert flatten(
        {"advantage_shapers": ["calibadv", {"edas": {"alpha": 0.3, "edas_beta": 0.1}}, {"srar": None}]}
    ) == {
        "advantage_shapers": ["calibadv", "edas", "srar"],
        "edas_alpha": 0.3,
        "edas_beta": 0.1,
    }
    assert flatten({"objective": {"jsd": {"beta": 0.3}}}) == {"objective": "jsd", "beta": 0.3}
    assert flatten({"objective": {"gopd": {"reward_scale": 1.25, "tis_cap": 5}}}) == {
        "objective": "gopd",
        "reward_scale": 1.25,
        "gopd_tis_cap": 5,
    }


BAD = {
    "a typo": ({"advantage_shapers": [{"edas": {"alhpa": 1}}]}, "edas has no flag `alhpa`. Did you mean `alpha`"),
    "twice": ({"advantage_shapers": [{"edas": {"alpha": 1}}], "edas_alpha": 2}, "`edas_alpha` is given twice"),
    "two names": ({"objective": {"akl": {}, "hpd": {}}}, "must be a name, or a name with flags"),
    "no flags": ({"objective": {"akl": 0.5}}, "must be a name, or a name with flags"),
    "none to have": ({"objective": {"forward_kl": {"mu": 1}}}, "forward_kl has no flag `mu`. Its flags are none"),
}


@pytest.mark.parametrize("recipe, message", BAD.values(), ids=BAD)
def test_bad_mapping_is_refused_by_every_door_in_the_same_words(tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        flatten(recipe)
    findings = check(tmp_path / "recipe.yaml", recipe, "grpo" if "advantage_shapers" in recipe else "gkd")
    assert findings.errors == [str(error.value)]


def test_config_takes_a_mapping(tmp_path):
    config = GRPOConfig(str(tmp_path), advantage_shapers=[{"edas": {"alpha": 0.2}}], **EDAS)
    assert type(config) is GRPOConfig and config.advantage_shapers == ["edas"] and config.edas_alpha == 0.2
    config = GKDConfig(str(tmp_path), objective={"akl": {"mu": 0.3}}, use_cpu=True, bf16=False)
    assert (config.objective, config.akl_mu) == ("akl", 0.3)


def test_config_takes_the_flags_of_another_package(tmp_path, brevity):
    config = GRPOConfig(str(tmp_path), advantage_shapers=[{"brevity": {"alpha": 0.3}}], **START)
    assert config.advantage_shapers == ["brevity"] and config.brevity_alpha == 0.3
    assert isinstance(config, GRPOConfig) and config.to_dict()["brevity_alpha"] == 0.3
    assert GRPOConfig(str(tmp_path), advantage_shapers=["brevity"], **START).brevity_alpha == 0.1
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.brevity_alpha == 0.3 and type(twin) is type(config)
    with pytest.raises(ValueError, match=r"`brevity_alpha` must be in \[0, 1\]; got 3"):
        GRPOConfig(str(tmp_path), advantage_shapers=[{"brevity": {"alpha": 3}}], **START)


@pytest.mark.parametrize("form", ["mapping", "flat"])
def test_recipe_takes_the_flags_of_another_package(tmp_path, brevity, form):
    shapers = {"advantage_shapers": [{"brevity": {"alpha": 0.3}}]}
    if form == "flat":
        shapers = {"advantage_shapers": ["brevity"], "brevity_alpha": 0.3}
    recipe = {
        **START,
        **shapers,
        "model_name_or_path": "tiny:student",
        "dataset_name": "tiny:math",
        "dataset_config": "prompt_only",
        "reward_funcs": ["exact_answer_reward"],
        "output_dir": str(tmp_path / "out"),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert check(file, recipe).errors == []
    args = grpo.prepare(["--config", str(file)])[1]
    assert args.advantage_shapers == ["brevity"] and args.brevity_alpha == 0.3
    args = grpo.prepare(["--config", str(file), "--brevity_alpha", "0.5"])[1]
    assert args.brevity_alpha == 0.5
    bad = recipe | {"advantage_shapers": [{"brevity": {"alpha": 3}}]}
    bad.pop("brevity_alpha", None)
    assert check(file, bad).errors == ["`brevity_alpha` must be in [0, 1]; got 3."]


def test_config_with_two_packages_is_pickled_and_compared(monkeypatch, tmp_path, brevity):
    other = BREVITY.replace("brevity", "length").replace("Brevity", "Length")
    install(monkeypatch, tmp_path / "other", "length-pkg", other, shaper={"length": "Length"})
    config = GRPOConfig(str(tmp_path), advantage_shapers=[{"brevity": {"alpha": 0.3}}, "length"], **START)
    twin = pickle.loads(pickle.dumps(config))
    assert repr(twin) == repr(config) and (twin.brevity_alpha, twin.length_alpha) == (0.3, 0.1)
    assert "learning_rate=" in repr(config) and config.to_dict()["brevity_alpha"] == 0.3


def test_flag_is_refused_twice_by_config(tmp_path):
    with pytest.raises(ValueError, match="`edas_alpha` is given twice, 0.9 and 0.3"):
        GRPOConfig(str(tmp_path), advantage_shapers=[{"edas": {"alpha": 0.3}}], edas_alpha=0.9, **EDAS)


def test_command_line_wins_over_a_mapping(monkeypatch, tmp_path, capsys):
    from hf_rb.utils import compat

    recipe = yaml.safe_load((resource_folder("recipes") / "skewed_kl/tiny-cpu.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / "out")}))
    calls = []
    monkeypatch.setattr(compat, "launch_command", calls.append, raising=False)
    assert main(["gkd", str(tmp_path / "recipe.yaml"), "--skewed_kl_alpha", "0.2"]) == 0
    assert calls[0].training_script_args[-2:] == ["--skewed_kl_alpha", "0.2"]


@pytest.mark.parametrize(
    "keys", [{"srar_judge_api_key_env": "sk-SECRET"}, {"srar_judge_kwargs": {"api_key": "sk-SECRET"}}]
)
def test_no_message_of_an_idle_flag_repeats_a_key(tmp_path, keys):
    [name] = keys
    with pytest.raises(ValueError, match=f"`{name}` has no effect without the shaper 'srar'") as error:
        GRPOConfig(str(tmp_path), **START, **keys)
    assert "SECRET" not in str(error.value)
    assert "SECRET" not in str(check(tmp_path / "recipe.yaml", keys, "grpo").errors)


def test_flag_of_another_package_without_it_is_unknown(tmp_path, brevity):
    recipe = {"advantage_shapers": ["edas"], "brevity_alpha": 0.3}
    assert "unknown key `brevity_alpha`" in check(tmp_path / "recipe.yaml", recipe, "grpo").errors[0]
