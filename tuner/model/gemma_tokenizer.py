"""Load the tokenizer of a Gemma 3."""

from transformers import AutoTokenizer

from tuner.data import chat_text
from tuner.model import folders
from tuner.system.errors import UserError


def load_tokenizer(model, **kwargs):
    """Return the tokenizer of a folder or hub name. Raise UserError if it is not Gemma 3's."""
    tokenizer = AutoTokenizer.from_pretrained(model, **kwargs)
    if tokenizer.chat_template is None:
        raise UserError(f"{model} has no chat template; use an instruction-tuned model: {folders.BASE_MODEL}")
    if chat_text.END_OF_TURN not in tokenizer.get_vocab():
        raise UserError(
            f"{model} is not a Gemma 3 model: its tokenizer has no {chat_text.END_OF_TURN}; "
            "choose one with --model"
        )
    return tokenizer
