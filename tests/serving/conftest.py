import pytest

from tests.support.echo_server import serving
from train_qlora import quantization_config
from tuner.inference import generation


@pytest.fixture(scope="module")
def plain(tiny_text_model):
    """(model, tokenizer) of random weights."""
    return generation.load_model(tiny_text_model, "tiny", None, quantization_config)


@pytest.fixture(scope="module")
def echoing(echo):
    with serving(echo) as server:
        yield server


@pytest.fixture(scope="module")
def plain_server(plain):
    with serving(plain) as server:
        yield server
