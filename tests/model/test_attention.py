"""What a token of packed rows may attend to."""

from types import SimpleNamespace

import pytest
import torch

from tuner.model import attention

WINDOW = 3


def model(dtype=torch.float32):
    text = SimpleNamespace(sliding_window=WINDOW)
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text),
        get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(1, dtype=dtype)),
    )


def test_a_token_sees_earlier_ones_of_its_own_row_and_in_local_layers_within_the_window():
    sequence_ids = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    positions = torch.arange(7)
    masks = attention.attention_masks(
        model(), (sequence_ids[:, None] == sequence_ids)[None], positions[:, None] - positions
    )
    for layer_type, window in (("full_attention", 100), ("sliding_attention", WINDOW)):
        mask = masks[layer_type]
        assert mask.shape == (1, 1, 7, 7)
        for query in range(7):
            for key in range(7):
                seen = sequence_ids[query] == sequence_ids[key] and 0 <= query - key < window
                assert mask[0, 0, query, key] == (0 if seen else torch.finfo(torch.float32).min)


def test_a_mask_has_the_dtype_of_the_model():
    masks = attention.attention_masks(model(torch.bfloat16), torch.ones(1, 1, 1).bool(), torch.zeros(1, 1))
    assert {mask.dtype for mask in masks.values()} == {torch.bfloat16}


def test_the_models_own_attention_is_restored_after_an_error_too():
    config = SimpleNamespace(_attn_implementation="sdpa")

    def fail():
        with attention.packed_attention(config):
            assert config._attn_implementation == attention.PACKED_ATTENTION
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert config._attn_implementation == "sdpa"
