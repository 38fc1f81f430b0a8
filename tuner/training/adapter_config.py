"""What a stranger's adapter_config.json may say: a plain LoRA of modules by name, and nothing that runs."""

import os
import re

from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.training.checkpoints import CONFIG

TRAIN_AGAIN = "train again: python train_qlora.py"
VISION_TOWER = r".*vision_tower.*"  # what our own adapters exclude: the only pattern that is ever evaluated
NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
LARGEST_NAMES = 2000, 200  # how many, and how many letters each: 4B has 400 modules
LONGEST_PATH = 4096  # characters: of a base's folder, as Linux allows
LARGEST_RANK, LARGEST_ALPHA = 65_536, 1e6
# What PEFT 0.21.2 may import a module for, or unpickle a file for.
RUN_OR_UNPICKLED = ("megatron_config", "auto_mapping", "corda_config", "lora_ga_config")
# These have values in every adapter; none is handed to PEFT unless checked on its own.
IGNORED = {"base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version"}
IGNORED |= {"qalora_group_size", "revision"}


def check(folder, config):
    """Raise UserError unless a config, as a dict, is of a plain LoRA: what lora_settings hands to PEFT.

    Any other setting has to be empty: PEFT's others change the base's weights, add weights of other kinds, or
    import what they name. A pattern is refused, since matching it may take for ever.
    """
    place = f"{folder}/{CONFIG}"
    if config.get("peft_type") != "LORA":
        method = printable(str(config.get("peft_type")))
        raise UserError(f"{folder} was made by the method {method}, not by LoRA; {TRAIN_AGAIN}")
    base = config.get("base_model_name_or_path")
    if not is_path(base):
        raise UserError(f"{place} names no base model; {TRAIN_AGAIN}")
    for name, (is_right, expected) in SETTINGS.items():
        if not is_right(config.get(name)):
            value = printable(repr(config.get(name)), 40) if name in config else "missing"
            raise UserError(f"{place}: {name} is {value}, expected {expected}; {TRAIN_AGAIN}")
    for name, value in config.items():
        if value and name not in SETTINGS and name not in IGNORED:
            reason = "may run any code" if name in RUN_OR_UNPICKLED else "is more than plain LoRA"
            raise UserError(f"{place} has a {printable(name)}, which {reason}; {TRAIN_AGAIN}")


def lora_settings(config):
    """Return the arguments of PEFT's LoraConfig for a checked config, as a dict."""
    return {
        "base_model_name_or_path": config["base_model_name_or_path"],
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": config["target_modules"],
        "exclude_modules": config.get("exclude_modules") or None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }


def scale(config):
    """Return what B·A is multiplied by: alpha/r, or alpha/√r for a rank-stabilized LoRA."""
    return config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)


def is_path(value):
    """Return whether a value is a text that can name a file."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_PATH or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half a surrogate pair, as JSON may have it
        return False
    return True


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_names(value):
    """Return whether a value is a list of plain names of modules."""
    count, letters = LARGEST_NAMES
    return (
        isinstance(value, list)
        and 0 < len(value) <= count
        and all(isinstance(v, str) and len(v) <= letters and NAME.fullmatch(v) for v in value)
    )


def one_of(*values):
    return lambda value: any(value is v or (isinstance(v, str) and value == v) for v in values)


# {name: (function of its value, or of None where it is missing; what is expected)}
SETTINGS = {
    "task_type": (one_of("CAUSAL_LM", None), "CAUSAL_LM"),
    "r": (
        lambda value: is_number(value) and isinstance(value, int) and 0 < value <= LARGEST_RANK,
        f"a whole number from 1 to {LARGEST_RANK}",
    ),
    "lora_alpha": (
        lambda value: is_number(value) and 0 < value <= LARGEST_ALPHA,
        f"a number > 0, at most {LARGEST_ALPHA:.0f}",
    ),
    "lora_dropout": (
        lambda value: value is None or (is_number(value) and 0 <= value < 1),
        "a number from 0 to below 1",
    ),
    "use_rslora": (one_of(True, False, None), "true or false"),
    "bias": (one_of("none", None), '"none"'),
    "init_lora_weights": (one_of(True, False, None, "gaussian"), "true, false or gaussian"),
    "target_modules": (are_names, "a list of names of modules, no pattern"),
    "exclude_modules": (
        lambda value: value in (None, [], VISION_TOWER) or are_names(value),
        "a list of names of modules, no pattern",
    ),
}
