"""Make a model of random weights with the dimensions of google/gemma-3-4b-it: all that speed and memory need.

python benchmarks/random_gemma_4b.py FOLDER [--tokenizer gemma-3-270m]
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    SiglipVisionConfig,
)

INITIALIZER_RANGE = 0.02  # standard deviation of the weights, config.initializer_range of Gemma 3


def config():
    """Return the Gemma3Config of google/gemma-3-4b-it (its config.json, and arXiv 2503.19786)."""
    text = Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        max_position_embeddings=131_072,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    )
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=256, eos_token_id=[1, 106]
    )


def write(folder, tokenizer, device, config):
    """Write the model (8.6 GB of bf16 safetensors) into a folder, with the tokenizer files of another."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gave the output head its own memory
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, std=INITIALIZER_RANGE)
        else:  # a norm's weight is 1 + what is stored, SigLIP's norms are plain ones
            torch.nn.init.constant_(parameter.data, float("vision" in name and "norm.weight" in name))
    model.generation_config = GenerationConfig(eos_token_id=[1, 106], pad_token_id=0, bos_token_id=2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(tokenizer, name), folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument(
        "--tokenizer", default="gemma-3-270m", help="folder to copy it from (default: %(default)s)"
    )
    args = parser.parse_args()
    write(args.folder, args.tokenizer, "cuda" if torch.cuda.is_available() else "cpu", config())


if __name__ == "__main__":
    main()
