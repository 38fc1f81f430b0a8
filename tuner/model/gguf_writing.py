"""Write a merged Gemma 3 as one GGUF file, what llama.cpp's convert_hf_to_gguf.py makes of the same folder.

Of a model with images, that is its language model.
"""

import logging
import math
import os
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import safe_open
from transformers import AutoConfig

from tuner.model import folders, gemma_folder, gguf_files, gguf_vocabulary
from tuner.model.gguf_conversion import LAYER_NAMES, TOP_NAMES
from tuner.system import atomic
from tuner.system.console import one_line, printable
from tuner.system.errors import UserError

QUANTIZATIONS = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
NAMES = {"lm_head.weight": "output.weight"}  # there only if it is not the embedding
NAMES |= {gemma_folder.canonical(theirs): ours for ours, theirs in TOP_NAMES.items()}
MODULES = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
IMAGES = ("vision_tower.", "multi_modal_projector.")  # canonical names of what is not the language model's
CHUNK = 2**22  # values that are read, converted and written at a time
METADATA_BYTES = 20e6  # and less: 12 MB of vocabulary
# Gemma's tokenizer puts a <bos> between two texts too, and gguf warns of it: no chat is a pair of texts.
logging.getLogger("gguf.vocab").setLevel(logging.ERROR)


def write_gguf(output, kind, again):
    """Write the GGUF of the merged folder `output`, and the Modelfile, and print what was written.

    kind: one of gguf_files.TYPES; again: the command that writes these two alone. Raise UserError.
    """
    path, modelfile = gguf_files.gguf_path(output), gguf_files.modelfile_path(output)
    target = Path(os.path.realpath(path))
    with gemma_folder.explained(output):
        writer = prepare(Path(output), kind)
    try:
        for older in (target, modelfile):  # of another merge, and its room may be needed
            older.unlink(missing_ok=True)
        folders.check_free_disk(target, gguf_bytes(output, kind))
        with atomic.new_file(target) as part:
            write_file(writer, part)
            with atomic.open_text(modelfile) as file:
                file.write(gguf_files.modelfile(output))
    except OSError as error:
        reason = printable(error.strerror or str(error), 100)
        cure = f"free some disk space, then type: {again}"
        raise UserError(f"{path} cannot be written ({reason}); {output} is complete; {cure}") from error
    print(f"gguf       {one_line(str(path))}, {kind}, {target.stat().st_size / 1e9:.1f} GB")
    print(f"ollama     {one_line(str(modelfile))}")


def gguf_bytes(folder, kind):
    """Return how many bytes the GGUF of a model folder takes, a few MB more at most."""
    return sum(tensor.nbytes for _, tensor in tensors(folder, kind)) + METADATA_BYTES


def prepare(folder, kind):
    """Return a GGUFWriter that has the folder's metadata, and its tensors, which are still to be read."""
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA3])
    for name, tensor in tensors(folder, kind):
        writer.add_tensor(name, tensor, raw_dtype=tensor.kind)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    add_description(writer, folder.absolute())
    add_parameters(writer, config, kind)
    add_vocabulary(writer, folder, config.vocab_size)
    return writer


def write_file(writer, path):
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# ------------------------------------------------------------------------------------------------ tensors


def tensors(folder, kind):
    """Yield (name, StreamedTensor) of a folder's language model, in the order of its files."""
    for path in folders.weight_files(folder):
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            if not gemma_folder.canonical(name).startswith(IMAGES):
                yield gguf_name(name), StreamedTensor(path, name, shape, QUANTIZATIONS[kind])


def gguf_name(name):
    """Return what GGUF calls a tensor of the language model."""
    name = gemma_folder.canonical(name)
    if not name.startswith("layers."):
        return NAMES[name]
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{MODULES[module]}.weight"


class StreamedTensor:
    """What a GGUFWriter takes for an array, read and converted a few rows at a time while it is written.

    Norms are in fp32, as 1 + weight, which Gemma multiplies by; rows that do not divide into Q8_0's blocks
    of 32 are in fp16.
    """

    def __init__(self, path, name, shape, kind):
        self.path, self.name, self.rows = path, name, shape[0]
        self.is_norm = len(shape) == 1
        if self.is_norm:
            kind = gguf.GGMLQuantizationType.F32
        elif shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16
        self.kind, self.row_values = kind, math.prod(shape[1:])
        self.shape = quant_shape_to_byte_shape(shape, kind)
        self.dtype, self.nbytes = np.dtype(np.uint8), math.prod(self.shape)

    def tofile(self, file):
        step = max(1, CHUNK // self.row_values)
        with safe_open(self.path, "pt") as source:
            rows = source.get_slice(self.name)
            for start in range(0, self.rows, step):
                values = rows[start : start + step].float().numpy() + np.float32(self.is_norm)
                file.write(quantize(values, self.kind).tobytes())


# ----------------------------------------------------------------------------------------------- metadata


def add_description(writer, folder):
    """Add what the model is called and made of, by its folder's name, model card and configs."""
    total, *parts = writer.get_total_parameter_count()
    metadata = gguf.Metadata.load(None, folder, None, total)
    metadata.name = metadata.name or folder.name
    metadata.size_label = metadata.size_label or gguf.size_label(total, *parts)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def add_parameters(writer, config, kind):
    """Add the sizes of a Gemma3TextConfig."""
    rope = config.rope_parameters
    everywhere, local = rope["full_attention"], rope["sliding_attention"]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if everywhere["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(everywhere["factor"])
    writer.add_rope_freq_base(everywhere["rope_theta"])
    writer.add_rope_freq_base_swa(local["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(FILE_TYPES[kind])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_vocabulary(writer, folder, size):
    """Add the tokenizer, with its special tokens and the chat template."""
    token_list, scores, types = gguf_vocabulary.read_vocabulary(folder, size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(token_list)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, n_vocab=size).add_to_gguf(writer)
    writer.add_add_space_prefix(False)
