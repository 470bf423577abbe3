"""Shared fixtures. The environment is set before anything of the Hugging Face stack is imported: no test may go online."""

import os


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    TRL_EXPERIMENTAL_SILENCE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)

import pytest


@pytest.fixture
def one_thread():
    """Torch with one thread: threads that wait for others of a busy machine count as processor time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
