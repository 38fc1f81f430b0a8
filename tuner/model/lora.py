"""Wrap a base with LoRA."""

from peft import get_peft_model


def add_lora(model, config):
    """Return the model wrapped by a LoraConfig: nothing else is trained.

    prepare_model_for_kbit_training is not called: it would cast the 262k-row embedding to fp32 (+1.3 GB).
    """
    exclude_modules, vision = config.exclude_modules, getattr(model.config, "vision_config", None)
    if not (vision and vision.num_hidden_layers):  # PEFT warns of a pattern that excludes nothing
        config.exclude_modules = None
    model = get_peft_model(model, config)
    if vision:  # whoever loads the adapter may have a vision tower with layers
        config.exclude_modules = exclude_modules
    return model
