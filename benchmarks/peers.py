"""What both peers' scripts do: train with TRL's SFTTrainer on our rows, labels and split, and measure."""

import argparse
import json
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from train_qlora import RECIPE, load_data, preprocess_function
from tuner.data import batching, tokenized
from tuner.data.splitting import split_rows
from tuner.system import devices, libraries


class Clock(TrainerCallback):
    """Measure the seconds of each step, until the GPU is done with it."""

    def __init__(self):
        self.seconds, self.started = [], 0.0

    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def parse_arguments():
    """Return model (a folder), data and result (files), bits, epochs and settings (of SFTConfig)."""
    parser = argparse.ArgumentParser(description="Train as a peer does; benchmarks/run.py starts this.")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("result")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    return parser.parse_args()


def train(args, peer, model, tokenizer):
    """Train `model`, which has its LoRA already, and write to args.result what run.json has of ours."""
    rows = load_data(args.data)
    training, _ = split_rows(rows, RECIPE)
    examples = tokenized.tokenize_rows(args.data, rows, tokenizer, preprocess_function, RECIPE.max_tokens)
    examples = [{k: examples[i][k] for k in ("input_ids", "labels")} for i in training]
    settings = {"per_device_train_batch_size": RECIPE.rows_per_step, "gradient_accumulation_steps": 1}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            num_train_epochs=args.epochs,
            learning_rate=RECIPE.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=RECIPE.warmup_steps,
            max_grad_norm=RECIPE.max_grad_norm,
            optim="paged_adamw_8bit",
            bf16=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            seed=RECIPE.seed,
            max_length=RECIPE.max_tokens,
            weight_decay=0.0,
            **{**settings, **args.settings},
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        trainer.save_model(folder)
    result = {
        "step_seconds": clock.seconds,
        "trained_tokens": batching.trained_tokens(examples),
        "peak_memory_gib": devices.peak_memory(torch.device("cuda:0")),
        "versions": {**libraries.library_versions(), peer: metadata.version(peer)},
    }
    Path(args.result).write_text(json.dumps(result))
