"""Convert the GGUF file of a Gemma 3 text model to a transformers folder."""

import json
import shutil

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3TextConfig
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from tuner.model import folders
from tuner.system import atomic
from tuner.system.errors import UserError

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


# -------------------------------------------------------------------------------- weights and config


class ArrayReader(GGUFReader):
    """A reader that sees the file as a plain array: slicing a memmap a million times takes 20 s more."""

    @property
    def data(self):
        return self.array

    @data.setter
    def data(self, memmap):
        self.array = memmap.view(np.ndarray)


def convert_model(gguf_path, folder):
    """Write weights, config.json and generation_config.json of a GGUF file into `folder` (a path).

    The mapping is the inverse of llama.cpp's convert_hf_to_gguf.py.
    """
    reader = ArrayReader(gguf_path)
    tensors = read_tensors(reader)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_config(reader, vocabulary_size=len(tensors["model.embed_tokens.weight"]))
    config.save_pretrained(folder)
    atomic.copy_permissions(folder)
    generation = {
        "do_sample": False,
        "bos_token_id": SPECIAL_TOKENS["<bos>"],
        "eos_token_id": [SPECIAL_TOKENS["<eos>"], SPECIAL_TOKENS["<end_of_turn>"]],
        "pad_token_id": SPECIAL_TOKENS["<pad>"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def read_tensors(reader):
    """Return {transformers' name: bf16 tensor} of all weights.

    GGUF stores a norm as 1 + weight, since Gemma multiplies by that, and no output head, since the embedding
    is the head too.
    """
    tensors = {}
    for tensor in reader.tensors:
        name = tensor.name
        values = dequantize(tensor.data, tensor.tensor_type)
        if name.startswith("blk."):
            _, layer, module, _ = name.split(".")
            new_name = f"model.layers.{layer}.{LAYER_NAMES[module]}.weight"
        else:
            new_name = TOP_NAMES[name]
        if name.endswith("norm.weight"):
            values = values - 1
        tensors[new_name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    return tensors


def read_config(reader, vocabulary_size):
    """Return the Gemma3TextConfig that the file's metadata describe."""
    stored = {
        key.removeprefix("gemma3."): field.contents()
        for key, field in reader.fields.items()
        if "gemma3." in key
    }
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
        vocab_size=vocabulary_size,
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
    )


# ----------------------------------------------------------------------------------------- tokenizer


def convert_tokenizer(gguf_path, folder):
    """Write the tokenizer of the GGUF file `gguf_path` into `folder` (a path), with Gemma's chat template."""
    architecture, vocabulary, _ = get_gguf_tokenizer(gguf_path)
    tokenizer, _ = convert_gguf_tokenizer(architecture, vocabulary)
    for token, number in SPECIAL_TOKENS.items():
        if tokenizer.token_to_id(token) != number:
            raise UserError(f"{gguf_path}: {token} is not token {number}; this is not Gemma 3's vocabulary")
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
    shutil.copyfile(folders.CHAT_TEMPLATE, folder / "chat_template.jinja")
