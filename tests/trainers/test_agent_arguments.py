from hf_rb import GRPOConfig


ENDPOINT = {"advantage_shapers": ["srar"], "srar_judge": "http://localhost:8000/v1", "srar_judge_model": "m"}


def config(tmp_path, **fields):
    return GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **fields)


def test_agent_arguments_with_allowed_values_are_kept(tmp_path):
    config(tmp_path, **ENDPOINT, srar_judge_api_key_env="JUDGE_KEY_2", srar_judge_kwargs={"max_tokens": 9})
    config(tmp_path, environment="search", environment_kwargs={"corpus": "x.jsonl"}, advantage_shapers=["calibadv"])
    assert config(tmp_path, environment="search", environment_kwargs='{"top_k": 2}').environment_kwargs == {"top_k": 2}
