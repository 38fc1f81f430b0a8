"""Look into a model folder before transformers does: a whole Gemma 3, and nothing in it that runs."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open

from tuner.model import folders
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.system.scripts import is_out_of_memory

# The model_type of config.json and of the parts in it; None: transformers knows that one by itself.
TYPES = {"": ("gemma3", "gemma3_text"), "text_config": (None, "gemma3_text")}
TYPES |= {"vision_config": (None, "siglip_vision_model")}
# Of the text model, in config.json: whole numbers, none of them so large in any Gemma 3.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SIZES += ("num_key_value_heads", "vocab_size", "sliding_window", "max_position_embeddings")
IMAGES = ("image_token_index", "boi_token_index", "eoi_token_index", "mm_tokens_per_image")  # of the whole
LARGEST_SIZE = 2**24
EMBEDDING, PATCHES = "embed_tokens.weight", "vision_tower.embeddings.patch_embedding.weight"
# What a size of a part is in the weights: {(part, key): (canonical name of a tensor, dimension)}.
DIMENSIONS = {
    ("text_config", "vocab_size"): (EMBEDDING, 0),
    ("text_config", "hidden_size"): (EMBEDDING, 1),
    ("text_config", "intermediate_size"): ("layers.0.mlp.up_proj.weight", 0),
    ("vision_config", "hidden_size"): (PATCHES, 0),
    ("vision_config", "num_channels"): (PATCHES, 1),
    ("vision_config", "patch_size"): (PATCHES, 2),
    ("vision_config", "intermediate_size"): ("vision_tower.encoder.layers.0.mlp.fc1.weight", 0),
}
LAYERS = {"text_config": "layers.", "vision_config": "vision_tower.encoder.layers."}
TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# Small JSON files that transformers reads, or that go along into a merged model for others to read.
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
JSON_FILES += ("added_tokens.json", "processor_config.json", "preprocessor_config.json")
# What has transformers 5.20 import a file of the folder or download a kernel, and the values that do not.
RUN = {"auto_map": (), "custom_pipelines": (), "custom_generate": ()}
RUN |= dict.fromkeys(("attn_implementation", "_attn_implementation"), ("eager", "sdpa"))
RUN |= dict.fromkeys(("experts_implementation", "_experts_implementation"), ("eager",))
DTYPES = ("BF16", "F16", "F32")
DOWNLOAD_AGAIN = "rename it, and download or merge it again"
UNQUANTIZED = "use the unquantized model, in bf16, fp16 or fp32"


def check(folder, name, cure):
    """Raise UserError unless a folder holds a whole Gemma 3; read JSON and the headers of weights only.

    name: what the folder is called in messages; cure: of what another folder, or none, would cure.
    """
    if missing := folders.missing_files(folder):
        raise UserError(f"{name} is not a complete model folder ({missing[0]} missing); {cure}")
    if Path(folder, "adapter_config.json").exists():  # transformers would put that adapter on the model
        raise UserError(f"{name} has an adapter_config.json beside the model; move the adapter out")
    check_links(folder, name)
    check_json(folder, name, cure)
    headers = read_headers(folder, name)
    for tensor, (dtype, _) in headers.items():
        if dtype not in DTYPES:
            raise UserError(f"{name} has weights in {dtype} ({printable(tensor)}); {UNQUANTIZED}")
    check_sizes(read_json(Path(folder, "config.json"), name), headers, name)


def is_complete(folder):
    """Return whether `folder` holds a whole Gemma 3; raise UserError if it holds something else."""
    if not folders.is_complete(folder):
        return False
    check(folder, folder, folders.RENAME)
    return True


def check_links(folder, name):
    """Raise UserError for a file that is a link to one outside the folder and the hub's cache.

    Tokenizer, configs and licenses go along with an adapter or a merged model: a private file might, too.
    """
    own = Path(folder).resolve()
    roots = (own.parents[1] if own.parent.name == "snapshots" else own, Path(HF_HUB_CACHE).resolve())
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors" or not path.is_symlink():
            continue
        if not any(path.resolve().is_relative_to(root) for root in roots):
            file = printable(path.name)
            raise UserError(f"{name}: {file} is a link to a file elsewhere; put a copy of that in its place")


def check_json(folder, name, cure):
    """Raise UserError if one of the folder's JSON_FILES is damaged, not Gemma 3's, or names code to run."""
    for file in JSON_FILES:
        path = Path(folder, file)
        if not path.is_file():  # a pipe would be waited for
            continue
        values = read_json(path, name)
        if key := runs(values):
            raise UserError(f"{name} names code to run ({file}: {key}), which is never done here; {cure}")
        if file == "config.json":
            check_config(values, name, cure)
        tokenizer = values.get("tokenizer_class")
        if tokenizer not in (None, *TOKENIZERS):
            raise UserError(f"{name} has another tokenizer than Gemma's ({file}: {shown(tokenizer)}); {cure}")


def check_config(config, name, cure):
    """Raise UserError unless config.json, as a dict, is of an unquantized Gemma 3."""
    for part, types in TYPES.items():
        values = config.get(part) or {} if part else config
        model_type = values.get("model_type") if isinstance(values, dict) else values
        if model_type not in types:
            key = f"{part}.model_type".lstrip(".")
            raise UserError(f"{name} is not a Gemma 3 (config.json: {key} is {shown(model_type)}); {cure}")
    text = config.get("text_config") or config
    numbers = [(text, key) for key in SIZES] + [(config, key) for key in IMAGES]
    for values, key in ((values, key) for values, key in numbers if key in values):
        if type(values[key]) is not int or not 0 < values[key] <= LARGEST_SIZE:
            reason = f"config.json: {key} is {shown(values[key])}"
            raise UserError(f"{name} is damaged ({reason}); {DOWNLOAD_AGAIN}")
    if config.get("quantization_config"):
        raise UserError(f"{name} is quantized already; {UNQUANTIZED}")


def check_sizes(config, headers, name):
    """Raise UserError if a size in config.json is another one in the weights.

    transformers would find out too, once it has made room for what config.json says, terabytes or not.
    """
    shapes = {canonical(tensor): shape for tensor, (_, shape) in headers.items()}
    sizes = {
        key: dict(enumerate(shapes.get(tensor, []))).get(dim) for key, (tensor, dim) in DIMENSIONS.items()
    }
    for part, prefix in LAYERS.items():
        layers = {t.removeprefix(prefix).split(".")[0] for t in shapes if t.startswith(prefix)}
        sizes[part, "num_hidden_layers"] = len(layers) or None
    for (part, key), size in sizes.items():
        values = config.get(part) or (config if part == "text_config" else {})
        if size is not None and key in values and values[key] != size:
            reason = f"config.json: {key} is {shown(values[key])}, in the weights it is {size}"
            raise UserError(f"{name} is damaged ({reason}); {DOWNLOAD_AGAIN}")


def canonical(name):
    """Return what a tensor is called in all of Gemma 3's classes and in files of any age.

    The text model's are `layers.0.…`, `embed_tokens.weight` and so on; the vision tower's keep their prefix.
    """
    return ".".join(
        part for part in name.split(".") if part not in ("model", "language_model", "vision_model")
    )


def read_json(path, name):
    """Return the object in a JSON file of the folder called `name`; raise UserError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(name, path.name, error) from error
    return values


def read_headers(folder, name):
    """Return {tensor: (dtype, such as BF16, shape)} of a folder's weights; raise UserError if damaged."""
    headers = {}
    for path in folders.weight_files(folder):
        try:
            with safe_open(path, "np") as file:
                slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
                headers |= {t: (part.get_dtype(), part.get_shape()) for t, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise damaged(name, path.name, error) from error
    return headers


def bf16_bytes(folder):
    """Return how many bytes a complete model's weights take in bf16, whatever they are in."""
    return sum(2 * math.prod(shape) for _, shape in read_headers(folder, folder).values())


def rounded_from(folder):
    """Return what a complete model's weights are in beside bf16: F16, F32, both or, mostly, nothing."""
    return sorted({dtype for dtype, _ in read_headers(folder, folder).values()} - {"BF16"})


def declare_bf16(path):
    """Say in a config.json that the weights are in bf16; one that says so already is left as it is."""
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(config[part] for part in TYPES if config.get(part))]
    declared = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    if any(part[key] != "bfloat16" for part, key in declared):
        for part, key in declared:
            part[key] = "bfloat16"
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def damaged(name, file, error):
    return UserError(f"{name} is damaged ({file}: {printable(str(error))}); {DOWNLOAD_AGAIN}")


def runs(values):
    """Return a key of JSON values, at any depth, that has transformers run what it names, or None."""
    left = [values]
    while left:
        value = left.pop()
        pairs = value.items() if isinstance(value, dict) else [(None, item) for item in value]
        for key, item in pairs:
            if key in RUN and item and item not in RUN[key]:
                return key
            if isinstance(item, dict | list):
                left.append(item)
    return None


def shown(value):
    return printable(json.dumps(value, ensure_ascii=False), 40)


@contextmanager
def explained(name):
    """Raise whatever a library raises in the body about the files of the folder `name` as a UserError.

    A file may say anything, and transformers answers with any exception; full memory keeps its own.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = printable(f"{type(error).__name__}: {error}", 100)
        raise UserError(f"{name} cannot be loaded as a model ({reason}); {DOWNLOAD_AGAIN}") from error
