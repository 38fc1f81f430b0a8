"""Load the tokenizer of a Gemma 3, with the one chat template that is used everywhere here."""

from contextlib import nullcontext
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from tuner.data import chat_text
from tuner.model import folders, gemma_folder
from tuner.system.console import printable
from tuner.system.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
# What a base's own template must write as folders.CHAT_TEMPLATE does: else the base learned another form.
PLAIN = ([USER], [USER, ASSISTANT, USER], [{"role": "system", "content": "c"}, USER])


def load_tokenizer(model, **kwargs):
    """Return the tokenizer of a folder or hub name, with the chat template of folders.CHAT_TEMPLATE.

    Raise UserError if it is not Gemma 3's.
    """
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
    own = [render(tokenizer, messages) for messages in PLAIN]
    tokenizer.chat_template = folders.CHAT_TEMPLATE.read_text(encoding="utf-8")
    for messages, text in zip(PLAIN, own, strict=True):
        if text != (expected := render(tokenizer, messages)):
            raise UserError(
                f"{model}: its chat template is not Gemma 3's: it gives {printable(repr(text), 120)} for "
                f"{expected!r}; choose another --model, or copy tuner/model/chat_template.jinja there"
            )
    return tokenizer


def render(tokenizer, messages):
    """Return the prompt of a conversation; an error of the chat template as its text."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        return f"an error: {error}"
