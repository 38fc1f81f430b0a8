"""Load the tokenizer of a Gemma 3."""

from tuner.data import chat_text
from tuner.model import folders
from tuner.system.errors import UserError


def load_tokenizer(model, **kwargs):
    """The tokenizer of a folder or hub name; raises UserError unless it is Gemma 3's, with a template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, **kwargs)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{model} has no chat template; take an instruction-tuned model: {folders.BASE_MODEL}"
        )
    if chat_text.END_OF_TURN not in tokenizer.get_vocab():
        raise UserError(
            f"{model} is no Gemma 3: its tokenizer has no {chat_text.END_OF_TURN}; name one with --model"
        )
    return tokenizer
