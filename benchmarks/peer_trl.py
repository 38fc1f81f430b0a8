"""Train as TRL's own QLoRA example does, with our recipe's numbers; benchmarks/run.py starts this."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from train_qlora import RECIPE, lora_config, quantization_config
from tuner.model import gemma_tokenizer, loading, lora

if __name__ == "__main__":
    args = peers.parse_arguments()
    quantization = quantization_config(args.bits, torch.bfloat16)
    model = loading.load_base(args.model, quantization, "cuda:0", torch.bfloat16)
    model = lora.add_lora(model, lora_config(RECIPE))
    peers.train(args, "trl", model, gemma_tokenizer.load_tokenizer(args.model))
