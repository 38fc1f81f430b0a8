"""Load the base model, quantized, with no weight missing or at random."""

from tuner.system.console import printable
from tuner.system.errors import UserError


def load_base(folder, bits, device, dtype, vision=True):
    """Returns the base model on one device, its linear layers quantised to 4 or 8 bits, or to none (None).

    Without vision the tower has no layers: no row has a picture, and they take a tenth of the memory.
    Raises UserError for a folder that is damaged or lacks weights.
    """
    import bitsandbytes
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    if bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif bits == 8:
        quantisation = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    else:
        quantisation = None
    try:
        config = AutoConfig.from_pretrained(folder)
        if without := not vision and hasattr(config, "vision_config"):
            config.vision_config.num_hidden_layers = 0
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            quantization_config=quantisation,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = printable(str(error), 100)
        raise UserError(f"{folder} is damaged ({reason}); remove it and fetch it anew") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise UserError(
            f"{folder} lacks weights ({names[0]} and {len(names) - 1} more); "
            "fetch it anew: python download_model.py"
        )
    unexpected = [key for key in map(str, report["unexpected_keys"]) if not (without and "vision" in key)]
    if unexpected:
        name = min(unexpected)
        raise UserError(f"{folder} holds weights that its model has no place for ({name}); fetch it anew")
    model.config.get_text_config().use_cache = False
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and torch.device(device).type == "cpu":
            # On CPUs with AVX512-BF16 bitsandbytes 0.50.2 repacks the weights at the first evaluation, and
            # the packed kernel has no autograd: later gradients lose two thirds of their norm in silence.
            module.support_avx512bf16_for_cpu = False
    return model
