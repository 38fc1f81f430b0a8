"""Load the base model, quantized, with no weight missing or at random."""

import bitsandbytes
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from tuner.system.console import printable
from tuner.system.errors import UserError


def load_base(folder, quantization_config, device, dtype, vision=True):
    """Return the base model on one device, its linear layers quantized (config None: not at all).

    Without vision the tower has no layers: no row has a picture, and they take a tenth of the memory.
    Raise UserError for a folder that is damaged or lacks weights.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        if without_tower := not vision and hasattr(config, "vision_config"):
            config.vision_config.num_hidden_layers = 0
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            quantization_config=quantization_config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = printable(str(error), 100)
        raise UserError(f"{folder} is damaged ({reason}); check --model, or download it again") from error
    check_report(folder, report, "vision" if without_tower else None)
    model.config.get_text_config().use_cache = False
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and torch.device(device).type == "cpu":
            # On CPUs with AVX512-BF16 bitsandbytes 0.50.2 repacks the weights at the first evaluation, and
            # the packed kernel has no autograd: later gradients lose two thirds of their norm in silence.
            module.support_avx512bf16_for_cpu = False
    return model


def check_report(folder, report, left_out):
    """Raise UserError if loading left weights at random, or had weights of no use.

    report: transformers' loading info; left_out: what the names of weights hold that were not to be loaded.
    """
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise UserError(
            f"{folder} lacks weights ({names[0]} and {len(names) - 1} more); "
            "download it again: python download_model.py"
        )
    unexpected = [key for key in map(str, report["unexpected_keys"]) if not (left_out and left_out in key)]
    if unexpected:
        name = min(unexpected)
        raise UserError(f"{folder} holds weights that its model has no place for ({name}); download it again")
