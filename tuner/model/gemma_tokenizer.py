"""Load the tokenizer of a Gemma 3, with the one chat template that is used everywhere here."""

import threading
from contextlib import nullcontext
from pathlib import Path

from transformers import AutoTokenizer

from tuner.data import chat_text
from tuner.model import folders, gemma_folder
from tuner.system.console import printable
from tuner.system.errors import UserError

TEMPLATE_SECONDS = 10  # Gemma's own takes some milliseconds
OTHER = "choose one with --model"
TAGS = {"<bos>": 1, "<start_of_turn>": 4, chat_text.END_OF_TURN: 3}  # in the second of PLAIN
UNLIMITED = 10**30  # rows are checked by the recipe's max_tokens; transformers would warn of its own limit
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
# What a base's own template must write as folders.CHAT_TEMPLATE does: else the base learned another form.
PLAIN = ([USER], [USER, ASSISTANT, USER], [{"role": "system", "content": "c"}, USER])


def load_tokenizer(model, **kwargs):
    """Return the tokenizer of a folder or hub name, with the chat template of folders.CHAT_TEMPLATE.

    Raise UserError if it is not Gemma 3's.
    """
    is_folder = Path(model).is_dir()
    if is_folder:
        gemma_folder.check_json(model, model, OTHER)
    with gemma_folder.explained(model) if is_folder else nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **kwargs)
    tokenizer.model_max_length = UNLIMITED
    if tokenizer.chat_template is None:
        raise UserError(f"{model} has no chat template; use an instruction-tuned model: {folders.BASE_MODEL}")
    if chat_text.END_OF_TURN not in tokenizer.get_vocab():
        raise UserError(
            f"{model} is not a Gemma 3 model: its tokenizer has no {chat_text.END_OF_TURN}; {OTHER}"
        )
    own = render_own(model, tokenizer)
    tokenizer.chat_template = folders.CHAT_TEMPLATE.read_text(encoding="utf-8")
    for messages, text in zip(PLAIN, own, strict=True):
        if text != (expected := render(tokenizer, messages)):
            raise UserError(
                f"{model}: its chat template is not Gemma 3's: it gives {printable(repr(text), 120)} for "
                f"{expected!r}; choose another --model, or copy tuner/model/chat_template.jinja there"
            )
    check_tokens(model, tokenizer)
    return tokenizer


def render_own(model, tokenizer):
    """Return what a model's own chat template gives for PLAIN; raise UserError if that takes for ever."""
    own = []
    # In a thread that the process does not wait for: a template's loops cannot be bounded otherwise.
    work = threading.Thread(target=lambda: own.extend(render(tokenizer, m) for m in PLAIN), daemon=True)
    work.start()
    work.join(TEMPLATE_SECONDS)
    if work.is_alive():
        raise UserError(
            f"{model}: its chat template takes more than {TEMPLATE_SECONDS} s for two words; "
            "copy tuner/model/chat_template.jinja there"
        )
    return own


def check_tokens(model, tokenizer):
    """Raise UserError unless a plain prompt has Gemma 3's special tokens, and decodes to itself.

    Or if a regular expression splits or changes text: Gemma 3 has none, and a hostile one never ends.
    """
    backend = tokenizer.backend_tokenizer
    for part in filter(None, (backend.normalizer, backend.pre_tokenizer, backend.decoder)):
        if b'"Regex"' in part.__getstate__():
            raise UserError(f"{model}: its tokenizer has a regular expression, Gemma 3's has none; {OTHER}")
    text = render(tokenizer, PLAIN[1])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    counts = {tag: ids.count(tokenizer.convert_tokens_to_ids(tag)) for tag in TAGS}
    special = {tokenizer.bos_token: "<bos>", tokenizer.pad_token: "<pad>"}
    if (
        counts != TAGS
        or any(is_now != tag for is_now, tag in special.items())
        or tokenizer.decode(ids) != text
    ):
        raise UserError(
            f"{model}: its tokenizer is not Gemma 3's, or damaged: it reads {printable(repr(text), 120)} as "
            f"{printable(str(tokenizer.convert_ids_to_tokens(ids)), 120)}; {gemma_folder.DOWNLOAD_AGAIN}"
        )


def render(tokenizer, messages):
    """Return the prompt of a conversation; an error of the chat template as its text."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may fail in any way
        return f"an error: {error}"
