"""A tiny Gemma 3 of random weights, in both its classes, and an adapter: trained in seconds."""

import string

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import train_qlora
from tuner.model import folders, lora
from tuner.system import libraries

SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 105: "<start_of_turn>", 106: "<end_of_turn>"}
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяё"
MERGES = [("\n", "\n"), ("▁", "▁"), ("о", "с"), ("т", "о"), ("c", "a"), ("ca", "l"), ("<", "t"), ("\n", "▁")]


def tiny_tokenizer():
    """Gemma's special tokens at Gemma's ids, characters, bytes for all others, and a few merges."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\n", "▁", *string.digits, *string.ascii_letters, *string.punctuation]
    tokens += [*CYRILLIC, *CYRILLIC.upper(), *(a + b for a, b in MERGES)]
    vocabulary = dict(map(reversed, SPECIAL.items()))
    free = (i for i in range(10**4) if i not in SPECIAL)
    vocabulary.update((token, next(free)) for token in dict.fromkeys(tokens))
    backend = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL.values()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = folders.CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def tiny_config(multimodal, hidden_size=64, layers=2):
    text = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"][:layers],
        max_position_embeddings=4096,
    )
    if multimodal:
        vision = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_use_head=False,
        )
        return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return text


def write_tiny_model(folder, multimodal=False, **sizes):
    """Write a complete model folder of about 100,000 random weights; return its path as a string."""
    torch.manual_seed(0)
    model = (Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM)(
        tiny_config(multimodal, **sizes)
    )
    model.generation_config = GenerationConfig(eos_token_id=[1, 106], pad_token_id=0, bos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_tiny_adapter(folder, base):
    """Write an adapter for the model in the folder `base`, with weights as large as trained ones."""
    with libraries.heavy_imports():  # loading shows no bar then, which a test would find in the output
        pass
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = lora.add_lora(model, train_qlora.lora_config(train_qlora.RECIPE))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder
