"""Load the tokenizer of a Gemma 3."""

from contextlib import nullcontext
from pathlib import Path

from transformers import AutoTokenizer

from tuner.data import chat_text
from tuner.model import folders, gemma_folder
from tuner.system.errors import UserError


def load_tokenizer(model, **kwargs):
    """Return the tokenizer of a folder or hub name. Raise UserError if it is not Gemma 3's."""
    is_folder = Path(model).is_dir()
    if is_folder:
        gemma_folder.check_json(model, model, "choose one with --model")
    with gemma_folder.explained(model) if is_folder else nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **kwargs)
    if tokenizer.chat_template is None:
        raise UserError(f"{model} has no chat template; use an instruction-tuned model: {folders.BASE_MODEL}")
    if chat_text.END_OF_TURN not in tokenizer.get_vocab():
        raise UserError(
            f"{model} is not a Gemma 3 model: its tokenizer has no {chat_text.END_OF_TURN}; "
            "choose one with --model"
        )
    return tokenizer
