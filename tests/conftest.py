"""A tiny Gemma 3, of random weights, in both its classes: the hermetic tests train it in seconds."""

import json
import os
import re
import resource
import shutil
import signal
import string
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

# Two threads in each of two workers wait for one another: one each takes 40 % of the CPU time and a third
# of the seconds (2 cores, tests of training and checkpoints). Before torch is loaded; children inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tuner.data import chat_text
from tuner.model import folders
from tuner.system import devices, libraries

# As train_qlora.py does before its first product; the first one of pytest's process is another test's.
devices.make_cpu_matmul_deterministic()
# A shell that starts pytest in the background has it ignore SIGINT, and its children would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 105: "<start_of_turn>", 106: "<end_of_turn>"}
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяё"
MERGES = [("\n", "\n"), ("▁", "▁"), ("о", "с"), ("т", "о"), ("c", "a"), ("ca", "l"), ("<", "t"), ("\n", "▁")]


def tiny_tokenizer():
    """Gemma's special tokens at Gemma's ids, characters, bytes for all others, and a few merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\n", "▁", *string.digits, *string.ascii_letters, *string.punctuation]
    tokens += [*CYRILLIC, *CYRILLIC.upper(), *(a + b for a, b in MERGES)]
    vocabulary = dict(map(reversed, SPECIAL.items()))
    free = (i for i in range(10**4) if i not in SPECIAL)
    vocabulary.update((token, next(free)) for token in dict.fromkeys(tokens))
    backend = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL.values()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = folders.CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def tiny_config(multimodal, hidden_size=64, layers=2):
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"][:layers],
        max_position_embeddings=4096,
    )
    if multimodal:
        vision = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_use_head=False,
        )
        return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return text


def write_tiny_model(folder, multimodal=False, **sizes):
    """Writes a whole model folder of about 100,000 random weights; returns its path as a string."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, GenerationConfig

    torch.manual_seed(0)
    model = (Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM)(
        tiny_config(multimodal, **sizes)
    )
    model.generation_config = GenerationConfig(eos_token_id=[1, 106], pad_token_id=0, bos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_tiny_adapter(folder, base):
    """Writes an adapter for the model in the folder `base`, with weights as large as trained ones."""
    import torch
    from transformers import AutoModelForCausalLM

    import train_qlora

    libraries.import_libraries()  # loading shows no bar then, which a test would find among what it looks at
    torch.manual_seed(1)
    model = train_qlora.add_lora(AutoModelForCausalLM.from_pretrained(base))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session", params=["text", "multimodal"])
def tiny_model(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp(request.param), request.param == "multimodal")


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("text-only"))


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory):
    """The path of 20 short rows, half of them with a call."""
    import train_qlora

    rows = sorted(train_qlora.load_data(ROOT / "examples.json"), key=lambda row: len(json.dumps(row)))
    kinds = {True: [], False: []}
    for row in rows:
        kinds[chat_text.is_call(row["messages"])].append(row)
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in kinds[True][:10] + kinds[False][:10]))
    return path


@contextmanager
def disk_for(size):
    """No file may become larger than `size` bytes: the same error as on a full disk, for every writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def other_writer(output):
    """Has another process write the folder `output` meanwhile, and kills it; gives its number."""
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from tuner.system import atomic\n"
        f"with atomic.exclusive_lock({str(output)!r}):\n    print('there', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"there\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def echo(tiny_text_model):
    from tests.support import echo_server

    return echo_server.echo(tiny_text_model)


@pytest.fixture(scope="module")  # it runs an event loop in this thread, which other tests want as well
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "google-chrome", "chromium-browser")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def contrast(page, selector):
    """WCAG 2 contrast of the text of the first such element with what is painted behind it."""
    colours = page.evaluate(
        """selector => {
          let element = document.querySelector(selector), behind = "rgba(0, 0, 0, 0)";
          const front = getComputedStyle(element).color;
          for (; element && behind === "rgba(0, 0, 0, 0)"; element = element.parentElement)
            behind = getComputedStyle(element).backgroundColor;
          return [front, behind];
        }""",
        selector,
    )
    bright = []
    for colour in colours:
        assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour), colour
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        bright.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(bright) + 0.05) / (min(bright) + 0.05), max(bright) == bright[0]
