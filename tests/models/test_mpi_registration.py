import pickle


def test_the_registry_can_be_copied():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import hf_rb

    copied = pickle.loads(pickle.dumps(CONFIG_MAPPING))
    assert copied["mpi_qwen3_moe"] is CONFIG_MAPPING["mpi_qwen3_moe"] is hf_rb.MPIQwen3MoeConfig
