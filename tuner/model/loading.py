"""Load the base model, quantized, with no weight missing or at random."""

import bitsandbytes
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tuner.model import gemma_folder
from tuner.system.console import printable
from tuner.system.errors import UserError

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_base(folder, quantization_config, device, dtype, vision=True):
    """Return the base model in `folder` on one device; quantization_config: a BitsAndBytesConfig, or None.

    Without vision the tower has no layers: no row has a picture, and they take a tenth of the memory.
    Raise UserError for a folder that is damaged or lacks weights.
    """
    with gemma_folder.explained(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text_only = not vision and hasattr(config, "vision_config")
        if text_only:
            config.vision_config.num_hidden_layers = 0
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            quantization_config=quantization_config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    check_report(folder, report, text_only)
    model.config.get_text_config().use_cache = False
    model.generation_config = end_tokens_only(folder, model)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and torch.device(device).type == "cpu":
            # On CPUs with AVX512-BF16 bitsandbytes 0.50.2 repacks the weights at the first evaluation, and
            # the packed kernel has no autograd: later gradients lose two thirds of their norm in silence.
            module.support_avx512bf16_for_cpu = False
    return model


def end_tokens_only(folder, model):
    """Return a GenerationConfig of the model's special tokens alone; raise UserError if they are none.

    How to sample is said in each call: the folder's other settings would change answers, or refuse them.
    """
    vocabulary = range(model.config.get_text_config().vocab_size)
    ids = {name: getattr(model.generation_config, name) for name in SPECIAL}
    for name, value in ids.items():
        values = value if isinstance(value, list) else [value]
        if not all(type(id) is int and id in vocabulary for id in values) or not values:
            reason = f"generation_config.json: {name} is {printable(repr(value), 40)}"
            raise UserError(f"{folder} is damaged ({reason}); {gemma_folder.DOWNLOAD_AGAIN}")
    return GenerationConfig(**ids)


def check_report(folder, report, text_only):
    """Raise UserError if transformers' loading report names a weight that was not loaded or not used."""
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        raise UserError(
            f"{folder} lacks weights ({printable(missing[0])} and {len(missing) - 1} more); "
            + gemma_folder.DOWNLOAD_AGAIN
        )
    unexpected = [key for key in map(str, report["unexpected_keys"]) if not (text_only and "vision" in key)]
    if unexpected:
        raise UserError(
            f"{folder} holds weights that its config.json does not describe ({printable(min(unexpected))}); "
            + gemma_folder.DOWNLOAD_AGAIN
        )
