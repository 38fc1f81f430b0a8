"""The files beside a merged model: its GGUF for llama.cpp, and the Modelfile with which Ollama reads that."""

import importlib.util
import os
from pathlib import Path

from tuner.system import atomic, commands, output_folder
from tuner.system.errors import UserError

TYPES = ("bf16", "q8_0")
# Gemma's turns with our calls and results, as chat_template.jinja writes them.
OLLAMA_TEMPLATE = Path(__file__).with_name("ollama_template.gotmpl")
MODELFILE = '''\
FROM ./{name}
TEMPLATE """{template}"""
PARAMETER temperature 0
PARAMETER stop "<end_of_turn>"
'''


def gguf_path(output):
    """Return the path of the GGUF of the merged folder `output`: beside it, by its name."""
    return _beside(output, ".gguf")


def modelfile_path(output):
    return _beside(output, ".Modelfile")


def _beside(output, suffix):
    path = Path(output)
    return path.with_name(path.name + suffix)


def modelfile(output):
    """Return the text of the Modelfile for the merged folder `output`."""
    template = OLLAMA_TEMPLATE.read_text(encoding="utf-8")
    return MODELFILE.format(name=gguf_path(output).name, template=template)


def serving_commands(output):
    """Return the commands that serve the merged folder `output` with llama.cpp, and bring it to Ollama.

    --skip-chat-parsing: to a request with tools, llama-server (in llama-cpp-python 0.3.36) answers with an
    error 500 where the model's call has none of the forms that it knows. --temp 0: as compare.py asks.
    """
    flags = ["--jinja", "--skip-chat-parsing", "--temp", "0", "--port", "8000"]
    return [
        commands.join(["llama-server", "-m", str(gguf_path(output)), *flags]),
        commands.join(["ollama", "create", Path(output).name, "-f", str(modelfile_path(output))]),
    ]


def check(output, overwrite):
    """Raise UserError unless both files of the merged folder `output` can be written, and may be."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed; type: pip install -r requirements.txt")
    for path in (gguf_path(output), modelfile_path(output)):
        target = Path(os.path.realpath(path))
        if not path.name.isprintable():
            raise UserError(f"{path}: a Modelfile cannot name this file; {output_folder.CURE}")
        if target.is_dir():
            raise UserError(f"{path} is a folder; {output_folder.CURE}")
        if not os.access(target.parent, os.W_OK):
            raise UserError(f"{target.parent} is not writable; {output_folder.CURE}")
        if target.exists() and not overwrite and not _is_modelfile(target, output):
            raise UserError(f"{path} exists; add --overwrite, or rename it")
        atomic.clear_workspaces(target)


def _is_modelfile(target, output):
    """Return whether a file is the Modelfile that would be written, which is no reason to refuse."""
    expected = modelfile(output).encode()
    return target.is_file() and target.stat().st_size == len(expected) and target.read_bytes() == expected
