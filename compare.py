"""Base and tuned side by side: does the tuned model call when it must, and only then?

python compare.py                    six probes, and the rows of heldout.json that no one was trained on
python compare.py --bits 4           on the card that trained it, if the unquantised model does not fit
"""

import argparse
import json
import sys
from pathlib import Path

import chat_rows
import download_model
import machine
import train_qlora
from machine import RunError

ADAPTER = "qlora_output"
HELD_OUT = "heldout.json"
# Four that need the call and two that do not; none of them stands in examples.json or heldout.json.
PROBES = [
    ("Какой у меня остаток на счёте?", True),
    ("Покажи мои последние покупки", True),
    ("Мой договор ещё действует?", True),
    ("Сколько я задолжал за квартиру?", True),
    ("Что такое кредитный лимит?", False),
    ("Добрый день, как настроение?", False),
]
CALL = '<tool_call name="get_sensitive_data" arguments="{}"/>'
MAX_NEW_TOKENS = 80


def load(adapter, bits):
    """Returns (model, tokenizer): the base that the adapter names, as it is or in `bits`, with the adapter.

    Computes in bf16 on a GPU that has it and in fp32 on a CPU, where bf16 is some 200 times slower.
    Raises RunError if there is no adapter or its base is missing.
    """
    config = Path(adapter, "adapter_config.json")
    if not config.is_file() or not Path(adapter, "adapter_model.safetensors").is_file():
        raise RunError(f"{adapter} holds no adapter; train one first: python train_qlora.py")
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]

    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    machine.quiet_libraries()
    gpu = torch.cuda.is_available()
    folder, _ = train_qlora.find_model(base, rehearse=not gpu)
    device, dtype = ("cuda:0", machine.gpu_dtype()) if gpu else ("cpu", torch.float32)
    model = train_qlora.load_model(folder, bits, device, dtype)
    model = PeftModel.from_pretrained(model, adapter).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def answer(model, tokenizer, conversations):
    """Answers a batch of conversations, each a list of messages ending with the user's, greedily.

    Returns [(text, ended), …]; ended is whether the model stopped by itself within MAX_NEW_TOKENS.
    """
    import torch

    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    # Padded on the left, so that every answer begins where its prompt ends.
    batch = tokenizer(
        prompts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        pad_to_multiple_of=8,  # torch 2.11 on an H100 gave padded prompts of 33 tokens a wrong first token
        return_tensors="pt",
    ).to(model.device)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    with torch.inference_mode():
        output = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=True, eos_token_id=ends
        )
    answers = []
    for ids in output[:, batch["input_ids"].shape[1] :].tolist():
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        answers.append((tokenizer.decode(ids[:end], skip_special_tokens=False), end is not None))
    return answers


def fault(text, ended, needs_call):
    """Returns why an answer is wrong, or None: a call must be the whole of it, a general one hold none."""
    if not ended:
        return f"did not end within {MAX_NEW_TOKENS} tokens"
    if needs_call:
        return None if text == CALL else "malformed call" if "tool_call" in text else "no call"
    if "tool_call" in text:
        return "false call"
    return None if text.strip() else "empty answer"


def count(answers, needed):
    """Returns the confusion counts of [(text, ended), …]; `malformed` is a part of the missed."""
    faults = [fault(*a, need) for a, need in zip(answers, needed, strict=True)]
    right = sum(need and not f for f, need in zip(faults, needed, strict=True))
    false = sum(not need and "tool_call" in text for (text, _), need in zip(answers, needed, strict=True))
    missed = sum(needed) - right
    return {
        "needed": sum(needed),
        "right": right,
        "missed": missed,
        "malformed": faults.count("malformed call"),
        "general": len(needed) - sum(needed),
        "false": false,
        "f1": 2 * right / (2 * right + false + missed) if right else 0.0,
    }


def main():
    parser = argparse.ArgumentParser(description="Compare base and tuned model on probes and held-out rows.")
    parser.add_argument("--adapter", default=ADAPTER, help="folder of the adapter (default: %(default)s)")
    parser.add_argument("--data", default=HELD_OUT, help="rows never trained on (default: %(default)s)")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantise the base (default: unquantised)")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    args = parser.parse_args()
    try:
        sys.exit(run(args))
    except (RunError, download_model.ModelError, chat_rows.DataError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def run(args):
    """Returns the exit code: 0 if tuned passes every probe, else 1."""
    rows = chat_rows.read(args.data)
    model, tokenizer = load(args.adapter, args.bits)
    held_out = [row["messages"] for _, row in rows]
    conversations = [[{"role": "user", "content": prompt}] for prompt, _ in PROBES]
    conversations += [messages[:-1] for messages in held_out]
    needed = [need for _, need in PROBES] + [train_qlora.is_call(messages) for messages in held_out]
    print(
        f"answering {len(PROBES)} probes and {len(rows)} rows of {args.data}, untuned and tuned", flush=True
    )
    with model.disable_adapter():
        base = answer(model, tokenizer, conversations)
    tuned = answer(model, tokenizer, conversations)

    probes = []
    for (prompt, need), (base_text, _), (text, ended) in zip(PROBES, base, tuned, strict=False):
        reason = fault(text, ended, need)
        probes.append(
            {
                "prompt": prompt,
                "expected": "call" if need else "text",
                "base": base_text,
                "tuned": text,
                "pass": reason is None,
                "reason": reason,
            }
        )
        expected = "a call" if need else "text"
        print(f"\n{'FAIL: ' + reason if reason else 'pass'}   {prompt}   (needs {expected})")
        print(f"    base:   {chat_rows.printable(base_text)}")
        print(f"    tuned: {chat_rows.printable(text)}")

    n = len(PROBES)
    figures = {"base": count(base[n:], needed[n:]), "tuned": count(tuned[n:], needed[n:])}
    print(f"\n{args.data:<16}" + "".join(f"{key:>11}" for key in figures["base"]))
    for name, row in figures.items():
        print(
            f"{name:<16}"
            + "".join(f"{v:>11.2f}" if isinstance(v, float) else f"{v:>11}" for v in row.values())
        )
    for (line, _), (text, ended), need in zip(rows, tuned[n:], needed[n:], strict=True):
        if reason := fault(text, ended, need):
            print(f"{args.data}:{line}: {reason}: {chat_rows.printable(text)}")
    if args.json:
        report = {"probes": probes, "rows": figures}
        Path(args.json).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    passed = sum(probe["pass"] for probe in probes)
    print(f"\nthe tuned model passes {passed} of {len(PROBES)} probes")
    return 0 if passed == len(PROBES) else 1


if __name__ == "__main__":
    main()
