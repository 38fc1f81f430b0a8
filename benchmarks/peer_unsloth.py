"""Train as Unsloth's notebooks do, with our recipe's numbers; benchmarks/run.py starts this."""

import sys
from pathlib import Path

from unsloth import FastModel  # before torch, transformers and TRL, which it changes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from train_qlora import RECIPE
from tuner.model import gemma_tokenizer

if __name__ == "__main__":
    args = peers.parse_arguments()
    checkpointing = args.settings.pop("gradient_checkpointing")  # the model's here, not the trainer's
    model, _ = FastModel.from_pretrained(
        args.model,
        max_seq_length=RECIPE.max_tokens,
        load_in_4bit=args.bits == 4,
        load_in_8bit=args.bits == 8,
        use_gradient_checkpointing=checkpointing,
        trust_remote_code=False,
    )
    model = FastModel.get_peft_model(
        model,
        r=RECIPE.lora_r,
        lora_alpha=RECIPE.lora_alpha,
        lora_dropout=RECIPE.lora_dropout,
        finetune_vision_layers=False,
        use_gradient_checkpointing=checkpointing,
    )
    peers.train(args, "unsloth", model, gemma_tokenizer.load_tokenizer(args.model))
