"""How much GPU memory training will take, and the quickest plan that fits."""

from typing import NamedTuple

from tuner.data import batching

MICRO_BATCH_TOKENS = 2048  # examples × longest example; halved where the GPU's memory is full
LOGITS_AT_ONCE = 128  # trained tokens, with checkpointing; 262,208 logits each, the largest tensor of all
BLOCK, NESTED_BLOCK = 64, 256  # weights to a scale, and scales to a scale of theirs (QLoRA, arXiv 2305.14314)
BYTES_A_WEIGHT = {4: 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK), 8: 1.0}
# Measured with 40 to 2046 tokens at once, 4 and 8 bits, on an H100 (torch 2.11): what the logits of a trained
# token take while its loss is computed (bf16, and fp32 three times over), and how many tensors as wide as
# the hidden state are kept beside one a layer.
BYTES_A_LOGIT = 13.2
HIDDEN_BESIDE_LAYERS = 10
# As CUDA graphs, without checkpointing, what torch reserves: for a token, in widths of hidden state and MLP a
# layer; for a logit while its gradient is computed; and for everything else (bytes).
ACTIVATION_WIDTHS = {4: 6.05, 8: 6.35}
BYTES_A_KEPT_LOGIT = 10
OVERHEAD_BYTES = 0.34 * 2**30
EVALUATION_LOGITS = 8  # at once, or an eighth of a graph's tokens: what an evaluation has beside graphs
EVALUATION_TOKENS = 256  # at least, at a time in an evaluation: without a gradient they take little memory
MAX_GRAPH_TOKENS = 4096  # a mask is as large as their square
MULTIPLE = 8  # tokens: attention wants such multiples
MEMORY_FRACTION = 0.9  # of what is free on the GPU: training may reserve it, where --memory says nothing
RESERVED = 1.06  # what torch takes from the card for what it allocates
CONTEXT = 0.6 * 2**30  # bytes: CUDA's own, and the pages of the optimizer's state (60 MB on 4B)
USABLE = 0.95  # of a card's nominal memory: the driver and a desktop have the rest


class Workload(NamedTuple):
    """What decides memory and speed: lengths in tokens."""

    steps: list  # of one epoch, each the lengths of its rows
    longest: int  # of all rows
    trained: int  # tokens of all rows
    total: int  # tokens of all rows

    def describe(self):
        return f"{self.total} total, {self.trained} trained, longest row {self.longest}"


class Dimensions(NamedTuple):
    """The sizes of a Gemma 3's text model; training loads no layer of the vision tower."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    queries: int  # heads × width of a head
    keys: int  # key/value heads × width of a head


# google/gemma-3-4b-it, its config.json (arXiv 2503.19786)
GEMMA_3_4B_WEIGHTS = 4_300_079_472
GEMMA_3_4B = Dimensions(262_208, 2560, 10_240, 34, 2048, 1024)


def read_dimensions(config):
    """Return the Dimensions of a config.json, a dict; raise KeyError if it is no Gemma 3's."""
    text = config.get("text_config", config)
    head = text["head_dim"]
    sizes = [text[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")]
    return Dimensions(*sizes, text["num_attention_heads"] * head, text["num_key_value_heads"] * head)


def text_weights(dims):
    """Return how many weights the text model's seven projections have: what does the arithmetic."""
    return dims.layers * dims.hidden * (2 * dims.queries + 2 * dims.keys + 3 * dims.intermediate)


def lora_weights(dims, rank):
    """Return how many weights LoRA trains: rank × (inputs + outputs) of each projection."""
    attention = (dims.hidden + dims.queries) * 2 + (dims.hidden + dims.keys) * 2
    return rank * dims.layers * (attention + 3 * (dims.hidden + dims.intermediate))


def plain_weights(dims):
    """Return how many weights stay bf16: the embedding's, which is the output head too."""
    return dims.vocabulary * dims.hidden


def peak_bytes(dims, bits, rank, tokens, logits_at_once):
    """Return the bytes that torch allocates at most while it trains with layers checkpointed.

    tokens: of the largest micro-batch, rows × longest row; logits_at_once: of these, how many get logits at
    the same time.
    """
    activations = 2 * dims.hidden * (dims.layers + HIDDEN_BESIDE_LAYERS) * tokens
    logits = BYTES_A_LOGIT * dims.vocabulary * logits_at_once
    return fixed_bytes(dims, bits, rank) + activations + logits


def fixed_bytes(dims, bits, rank):
    """Return the bytes of the quantized model, of LoRA in fp32 and of its gradients."""
    weights = text_weights(dims) * BYTES_A_WEIGHT[bits] + 2 * plain_weights(dims)
    return weights + 2 * 4 * lora_weights(dims, rank)


def evaluation_logits(tokens, logits_at_once):
    """Return how many trained tokens an evaluation has logits of at once, beside graphs of `tokens`."""
    return max(EVALUATION_LOGITS, min(logits_at_once, tokens // EVALUATION_LOGITS))


class Plan(NamedTuple):
    """How many tokens a micro-batch may have: one that keeps all activations, and one with checkpointing.

    kept, logits: the bytes that a graph has for one of its tokens, and for the logits of a trained one.
    """

    tokens: int
    checkpointed: int
    kept: float = 0
    logits: float = 0


def make_plans(dims, bits, rank, budget, logits_at_once, longest):
    """Return the Plans for `budget` bytes of reserved memory and a longest row of `longest` tokens.

    One, if all rows fit into graphs or there is no room for any; else one with graphs and one without.
    """
    kept = ACTIVATION_WIDTHS[bits] * 2 * (dims.hidden + dims.intermediate) * dims.layers
    logit = BYTES_A_KEPT_LOGIT * dims.vocabulary

    def graphs(room, evaluation):
        """Tokens; evaluation: 1 if it has its logits beside them, as the memory of graphs is theirs, or 0."""
        few = (room - evaluation * logit * EVALUATION_LOGITS) / (kept + logit)
        few = min(few, room / (kept + logit + evaluation * logit / EVALUATION_LOGITS), logits_at_once)
        tokens = max((room - logit * logits_at_once * (1 + evaluation)) / kept, few)
        return int(min(MAX_GRAPH_TOKENS, max(0, tokens))) // MULTIPLE * MULTIPLE

    token = peak_bytes(dims, bits, rank, 1, 0) - peak_bytes(dims, bits, rank, 0, 0)
    checkpointed = (budget / RESERVED - peak_bytes(dims, bits, rank, 0, logits_at_once)) / token
    checkpointed = int(min(MAX_GRAPH_TOKENS, max(0, checkpointed)))
    tokens = graphs(budget - OVERHEAD_BYTES - fixed_bytes(dims, bits, rank), 1)
    if tokens >= longest:
        return [Plan(tokens, checkpointed, kept, logit)]
    # A row that no graph takes has all that it needs beside them, and so has an evaluation.
    tokens = graphs(budget - OVERHEAD_BYTES - least_bytes(dims, bits, rank, longest, logits_at_once), 0)
    return [Plan(0, checkpointed), *([Plan(tokens, longest, kept, logit)] if tokens else [])]


def least_bytes(dims, bits, rank, tokens, logits_at_once):
    """Return the bytes of reserved memory that a row of `tokens` tokens takes at least."""
    return peak_bytes(dims, bits, rank, tokens, logits_at_once) * RESERVED


def usable_bytes(gib):
    """Return the bytes that are free on a card of `gib` GiB, once CUDA has started."""
    return USABLE * gib * 2**30 - CONTEXT


# Seconds of a micro-batch of few tokens, by number of bits, on an H100 (torch 2.11): as a graph, and with its
# kernels launched one by one and its layers recomputed.
KERNELS, LAUNCHING = {4: 0.04, 8: 0.055}, {4: 1.1, 8: 0.9}


def split_packs(rows, tokens, state):
    """Return (packs, long): this process's rows of at most `tokens`, packed, and its longer ones."""
    own = batching.shard(rows, state)
    long = [row for row in own if batching.length(row) > tokens]
    return batching.group_packed(own[len(long) :], tokens), long


def plan_seconds(plan, steps, bits, state):
    """Return the seconds that the kernels of steps take, launched as a Plan has it.

    steps: the lengths, in tokens, of the rows of each.
    """
    graphs = padded = 0
    for lengths in steps:
        packs, long = split_packs([{"input_ids": range(length)} for length in lengths], plan.tokens, state)
        graphs += len(packs)
        padded += len(batching.group_padded(long, batching.length, plan.checkpointed))
    return KERNELS[bits] * graphs + LAUNCHING[bits] * padded


def quickest_plan(plans, steps, bits, state):
    """Return the Plan by which the steps are done first."""
    return min(plans, key=lambda plan: plan_seconds(plan, steps, bits, state))
