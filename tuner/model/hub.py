"""Bring a model from the Hugging Face hub: ask first, resume what broke off, check every file."""

import errno
import hashlib
import logging
from pathlib import Path

from tuner.model import folders
from tuner.system import atomic
from tuner.system.errors import UserError

# All that transformers reads, and the licence (Gemma's is named in the model card): the same weights in other
# formats, or in a folder of the repository, would be bytes paid for nothing.
NEEDED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "README.md"]
NOT_NEEDED = ["*/*"]
RESERVE = 10**9  # bytes of disk left free beside the model: a full disk breaks more than a download
CHECK_TIMEOUT = 10  # seconds for each of the two questions to the hub before the first large byte
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again, it goes on from there"


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
        text = f"no name of a model on the hub; one looks like {folders.BASE_MODEL}"
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
    part = atomic.part_path(folder)
    sizes = {path.name.removesuffix(".incomplete"): path.stat().st_size for path in part.glob("*.*")}
    have = sum(min(sizes.get(file.rfilename, 0), file.size) for file in files)
    total = sum(file.size for file in files)
    folders.check_free_disk(folder, total - have + RESERVE)
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
                atomic.fsync_tree(incomplete)
                atomic.rename_synced(incomplete, path)
        if missing := folders.missing_files(part):
            raise UserError(f"{repo}: has no {', '.join(missing)}; choose another model")
        (part / folders.REVISION_FILE).write_text(commit + "\n", encoding="utf-8")
        atomic.fsync_tree(part)
        atomic.rename_synced(part, folder)
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
        if not folders.missing_files(folder):
            return folder
    except HFValidationError as error:
        raise explain(error, repo) from error
    except LocalEntryNotFoundError:
        pass

    ask_hub(repo)  # for its errors
    try:
        files = snapshot_download(repo, **wanted, dry_run=True)
        folders.check_free_disk(
            Path(HF_HUB_CACHE), sum(f.file_size for f in files if f.will_download) + RESERVE
        )
        folder = snapshot_download(repo, **wanted)
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's
        raise explain(error, repo) from error
    if missing := folders.missing_files(folder):
        raise UserError(f"{repo}: has no {', '.join(missing)}; choose another model")
    return folder
