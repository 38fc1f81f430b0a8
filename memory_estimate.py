"""How much GPU memory training will take: worked out from the model's dimensions and the rows' lengths."""

from typing import NamedTuple

BLOCK, NESTED_BLOCK = 64, 256  # weights to a scale, and scales to a scale of theirs (QLoRA, arXiv 2305.14314)
BYTES_A_WEIGHT = {4: 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK), 8: 1.0}
# Measured with 40 to 2046 tokens at once, 4 and 8 bits, on an H100 (torch 2.11): what the logits of a trained
# token take while its loss is computed (bf16, and fp32 three times over), and how many tensors as wide as
# the hidden state are kept beside one a layer.
BYTES_A_LOGIT = 13.2
HIDDEN_BESIDE_LAYERS = 10
# Without checkpointing (cuda_graphs.py): what is kept of a token, in widths of hidden state and MLP a layer;
# what a logit takes while its gradient is worked out; what 8-bit layers take beside (bytes).
KEPT = 7
BYTES_A_KEPT_LOGIT = 10
BESIDE = {4: 0, 8: 0.2 * 2**30}
MOST = 4096  # tokens; a mask is as large as their square
RESERVED = 1.08  # what torch takes from the card for what it allocates
CONTEXT = 0.6 * 2**30  # bytes: CUDA's own, and the pages of the optimizer's state (60 MB on 4B)
USABLE = 0.95  # of a card's nominal memory: the driver and a desktop have the rest


class Dimensions(NamedTuple):
    """A Gemma 3's sizes; the vision ones are 0 in a text-only model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    queries: int  # heads × width of a head
    keys: int  # key/value heads × width of a head
    vision_hidden: int = 0
    vision_intermediate: int = 0
    vision_layers: int = 0
    patch: int = 0
    image: int = 0


# google/gemma-3-4b-it, its config.json (arXiv 2503.19786)
GEMMA_3_4B_WEIGHTS = 4_300_079_472
GEMMA_3_4B = Dimensions(262_208, 2560, 10_240, 34, 2048, 1024, 1152, 4304, 27, 14, 896)


def dimensions(config):
    """Returns the Dimensions of a config.json, a dict; raises KeyError if it is no Gemma 3's."""
    text, vision = config.get("text_config", config), config.get("vision_config") or {}
    head = text["head_dim"]
    sizes = [text[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")]
    sizes += [text["num_attention_heads"] * head, text["num_key_value_heads"] * head]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "image_size")
    return Dimensions(*sizes, *(vision.get(name, 0) for name in names))


def text_weights(d):
    """Returns how many weights the text model's seven projections have: what does the arithmetic."""
    return d.layers * d.hidden * (2 * d.queries + 2 * d.keys + 3 * d.intermediate)


def vision_weights(d):
    """Returns how many weights of the vision tower are quantised too."""
    return d.vision_layers * (4 * d.vision_hidden**2 + 2 * d.vision_hidden * d.vision_intermediate)


def lora_weights(d, rank):
    """Returns how many weights LoRA trains: rank × (inputs + outputs) of each projection."""
    attention = (d.hidden + d.queries) * 2 + (d.hidden + d.keys) * 2
    return rank * d.layers * (attention + 3 * (d.hidden + d.intermediate))


def plain_weights(d):
    """Returns how many weights stay bf16: the embedding (the output head too) and the eyes' ends."""
    eyes = d.vision_hidden * d.hidden
    if d.patch:
        eyes += d.vision_hidden * (3 * d.patch**2 + (d.image // d.patch) ** 2)
    return d.vocabulary * d.hidden + eyes


def peak(d, bits, rank, tokens, trained_at_once, several):
    """Returns the bytes that torch allocates at most while it trains with layers checkpointed.

    tokens: of the largest micro-batch, rows × longest row; trained_at_once: of these, how many get logits at
    the same time; several: whether a step has more than one micro-batch, whose gradients stay meanwhile.
    """
    activations = 2 * d.hidden * (d.layers + HIDDEN_BESIDE_LAYERS) * tokens
    logits = BYTES_A_LOGIT * d.vocabulary * trained_at_once
    return fixed(d, bits, rank) - 4 * lora_weights(d, rank) * (not several) + activations + logits


def fixed(d, bits, rank):
    """Returns the bytes of the quantised model, of LoRA in fp32 and of its gradients."""
    weights = (text_weights(d) + vision_weights(d)) * BYTES_A_WEIGHT[bits] + 2 * plain_weights(d)
    return weights + 2 * 4 * lora_weights(d, rank)


class Plan(NamedTuple):
    """How many tokens a micro-batch may have: that keeps all activations, and with layers checkpointed."""

    tokens: int
    checkpointed: int


def plan(d, bits, rank, budget, trained_at_once):
    """Returns the Plan for `budget` bytes of reserved memory."""
    room = budget / RESERVED - fixed(d, bits, rank) - BESIDE[bits]
    kept = KEPT * 2 * (d.hidden + d.intermediate) * d.layers
    tokens = (room - BYTES_A_KEPT_LOGIT * d.vocabulary * trained_at_once) / kept
    again = 2 * d.hidden * (d.layers + HIDDEN_BESIDE_LAYERS)
    checkpointed = (room - BYTES_A_LOGIT * d.vocabulary * trained_at_once) / again
    return Plan(min(MOST, max(0, int(tokens))), min(MOST, max(0, int(checkpointed))))


def least(d, bits, rank, tokens, trained_at_once):
    """Returns the bytes of reserved memory that a row of so many tokens takes at least."""
    return (peak(d, bits, rank, tokens, trained_at_once, True) + BESIDE[bits]) * RESERVED


def fits(allocated, card):
    """Whether a card of so many GiB takes a run that allocates so many bytes."""
    return allocated * RESERVED + CONTEXT <= USABLE * card * 2**30
