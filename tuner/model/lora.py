"""Wrap a base with LoRA."""

from peft import get_peft_model


def add_lora(model, config):
    """Return the model wrapped by a LoraConfig: nothing else is trained.

    prepare_model_for_kbit_training is not called: it would cast the 262k-row embedding to fp32 (+1.3 GB).
    """
    exclude_modules = config.exclude_modules
    if not has_vision_layers(model):  # PEFT warns of a pattern that excludes nothing
        config.exclude_modules = None
    model = get_peft_model(model, config)
    if hasattr(model.config, "vision_config"):  # who loads the adapter may have a vision tower with layers
        config.exclude_modules = exclude_modules
    return model


def has_vision_layers(model):
    vision = getattr(model.config, "vision_config", None)
    return bool(vision and vision.num_hidden_layers)
