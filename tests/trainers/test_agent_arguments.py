import pytest

from hf_rb import GRPOConfig


ENDPOINT = {"advantage_shapers": ["srar"], "srar_judge": "http://localhost:8000/v1", "srar_judge_model": "m"}
KEY = "sk-a1B2c3"


def config(tmp_path, **fields):
    return GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"environment": "serach"}, "`environment` cannot be 'serach'; did you mean 'search'"),
        ({"environment_kwargs": {"top_k": 3}}, "needs an environment: set `environment: search`"),
        ({"environment": "search", "environment_kwargs": {"topk": 3}}, "`environment_kwargs` has topk"),
        ({"environment": "search", "environment_kwargs": {"top_k": 0}}, "write a whole number of 1 or more"),
        ({"environment": "search", "environment_kwargs": {"top_k": "two"}}, "write a whole number of 1 or more"),
        ({"calibadv_step_field": "q"}, "has no effect without the shaper 'calibadv'"),
        ({"srar_judge": "tiny"}, "has no effect without the shaper 'srar'"),
        ({"srar_step_pattern": "x"}, "has no effect without the shaper 'srar'"),
        ({"advantage_shapers": ["srar"], "srar_step_pattern": "("}, r"`srar_step_pattern: \(` is not a regular expression"),
        ({"advantage_shapers": ["srar"], "srar_judge": "localhost:8000"}, "write the base URL"),
        ({"advantage_shapers": ["srar"], "srar_judge": "http://localhost/v1"}, "set `srar_judge_model`"),
        ({"advantage_shapers": ["srar"], "srar_judge": "tiny", "srar_judge_model": "m"}, "`srar_judge_model` acts only"),
        ({"advantage_shapers": ["srar"], "srar_judge": "tiny", "srar_judge_timeout": 5.0}, "`srar_judge_timeout` acts only"),
        ({**ENDPOINT, "srar_judge_timeout": 0.0}, r"`srar_judge_timeout` must be in \(0, inf\)"),
        ({**ENDPOINT, "srar_judge_retries": -1}, r"`srar_judge_retries` must be in \[0, inf\)"),
        ({**ENDPOINT, "srar_judge_concurrency": 0}, r"`srar_judge_concurrency` must be in \[1, inf\)"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"srar_judge_api_key_env": KEY},
        {"srar_judge_api_key_env": "hf_abcdefgh"},
        {"srar_judge": f"http://user:{KEY}@localhost/v1"},
        {"srar_judge": f"http://localhost/v1?api_key={KEY}"},
        {"srar_judge_kwargs": {"api_key": KEY}},
        {"srar_judge_kwargs": {"Authorization": f"Bearer {KEY}"}},
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_repeated(tmp_path, fields):
    with pytest.raises(ValueError, match="environment variable") as error:
        config(tmp_path, **ENDPOINT | fields)
    assert KEY not in str(error.value) and "hf_abcdefgh" not in str(error.value)


def test_agent_arguments_with_allowed_values_are_kept(tmp_path):
    config(tmp_path, **ENDPOINT, srar_judge_api_key_env="JUDGE_KEY_2", srar_judge_kwargs={"max_tokens": 9})
    config(tmp_path, environment="search", environment_kwargs={"corpus": "x.jsonl"}, advantage_shapers=["calibadv"])
    assert config(tmp_path, environment="search", environment_kwargs='{"top_k": 2}').environment_kwargs == {"top_k": 2}
