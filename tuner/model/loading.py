"""Load the base model, quantized, with no weight missing or at random."""

import bitsandbytes
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tuner.model import gemma_folder
from tuner.system.console import printable
from tuner.system.errors import UserError


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
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and torch.device(device).type == "cpu":
            # On CPUs with AVX512-BF16 bitsandbytes 0.50.2 repacks the weights at the first evaluation, and
            # the packed kernel has no autograd: later gradients lose two thirds of their norm in silence.
            module.support_avx512bf16_for_cpu = False
    return model


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
