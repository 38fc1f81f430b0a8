"""Download a model from the Hugging Face hub: ask first, resume what broke off, check every file."""

import errno
import hashlib
import logging
import os
from itertools import chain
from pathlib import Path

import httpx2  # what huggingface_hub sends its requests with
from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, tqdm

from tuner.model import folders, gemma_folder
from tuner.system import atomic, output_folder
from tuner.system.errors import UserError

# All that transformers reads, and the license (Gemma's is named in the model card): the same weights in other
# formats, or in a folder of the repository, would be bytes paid for nothing.
NEEDED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "README.md"]
NOT_NEEDED = ["*/*"]
RESERVE = 10**9  # bytes of disk left free beside the model: a full disk breaks more than a download
CHECK_TIMEOUT = 10  # seconds for each of the two requests to the hub before the first large byte
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again"
RETRY = f"{AGAIN} to continue"  # where something came, and stays
OTHER_MODEL = "choose another model"
LOGIN = f"create a token at {TOKENS_PAGE}, then `hf auth login` or set HF_TOKEN"


# -------------------------------------------------------------------------------------------- errors


def explain(error, repo, again=AGAIN):
    """Return the UserError for what huggingface_hub raised about `repo`, before or during a download.

    again: what to do once the cause is gone. The text of `error` is not repeated: it has many lines, and may
    quote a token that has a stray character.
    """
    about, text = "hub", None
    response = getattr(error, "response", None)
    if isinstance(error, HFValidationError):
        text = f"not a valid model name; example: {folders.BASE_MODEL}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to download"
    elif response is not None:
        about, text = explain_status(response.status_code, response.headers.get("X-Error-Code"), repo, again)
    elif isinstance(error, UnicodeError) or type(error).__name__ == "LocalProtocolError":
        about, text = "token", f"the hub rejected your token (401); {LOGIN}"  # it cannot even be sent
    elif getattr(error, "errno", None) == errno.ENOSPC:
        text = f"the disk is full; free some of it, then {again}"
    elif getattr(error, "errno", None):
        text = f"{error.filename or 'the disk'}: {error.strerror}; fix that, then {again}"
    else:
        kind = type(error).__name__
        text = f"hub unreachable ({kind}); check the connection, the proxy and HF_ENDPOINT, then {again}"
    return UserError(f"{repo}: {text}", about)


def explain_status(status, code, repo, again):
    """Return (what it is about, text) for an HTTP status of the hub and its X-Error-Code, or None."""
    page, has_token = f"https://huggingface.co/{repo}", bool(get_token())
    if code == "RevisionNotFound":
        return "hub", f"that version is no longer on the hub (404); see {page}/commits/main"
    if code == "EntryNotFound":
        return "hub", "has no config.json, so it cannot be trained here; choose another model"
    # Without a token the hub answers 401, not 404, for a missing model: it might be a private one.
    if status == 404 or (code == "RepoNotFound" and not has_token):
        return "hub", f"no such model on the hub (404), or a private one; check the name at {page}"
    if status == 401 and has_token:
        return "token", f"the hub rejected your token (401); {LOGIN}"
    if status == 401:
        return "token", f"no token (401); accept the license at {page}, {LOGIN}"
    if status == 403 and code == "GatedRepo":
        return "license", f"license not accepted (403); accept it at {page} with the account of your token"
    if status == 403:
        return (
            "token",
            f"your token may not read it (403); give it access to gated repositories: {TOKENS_PAGE}",
        )
    return "hub", f"error of the hub (HTTP {status}); wait a few minutes, then {again}"


# ----------------------------------------------------------------------------------------- downloads


def ask_hub(repo):
    """Return (commit, files) of `repo`: its newest commit and the `RepoSibling`s worth downloading.

    Ask for the first bytes (config.json) before the list, which a gated model gives to anybody.
    Raise UserError for all that `explain` knows.
    """
    # Its warnings are about retries, which the progress bar shows, and errors, which `explain` reports.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=CHECK_TIMEOUT)
        info = HfApi().model_info(repo, files_metadata=True, timeout=CHECK_TIMEOUT)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise explain(error, repo) from error
    wanted = filter_repo_objects(
        info.siblings, allow_patterns=NEEDED, ignore_patterns=NOT_NEEDED, key=lambda file: file.rfilename
    )
    return info.sha, sorted(wanted, key=lambda file: file.size)  # small ones first: they fail early


def is_intact(path, file):
    """Return whether `path` has the hub's checksum of `file`: a sha256, or for a small one git's sha1."""
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)


def download(repo, folder):
    """Download `repo` into `folder` (a path), resuming in `<folder>.part` where an earlier call broke off.

    That folder is marked; if one of its name is not, the next free name is taken. Raise UserError.
    """
    commit, files = ask_hub(repo)
    target = output_folder.resolve(folder, folders.RENAME)
    part = part_folder(target, files)
    present = sum(present_bytes(part, file) for file in files)
    total = sum(file.size for file in files)
    folders.check_free_disk(folder, total - present + RESERVE)
    resumed = f", {present / 1e9:.1f} GB already downloaded" if present else ""
    print(f"{repo} into {folder}: {len(files)} files, {total / 1e9:.1f} GB{resumed}", flush=True)
    try:
        part.mkdir(exist_ok=True)
        output_folder.mark(part)
        with tqdm(total=total, initial=present, unit="B", unit_scale=True, desc=folder.name) as bar:
            for file in files:
                if file.rfilename.endswith(".safetensors"):  # the gigabytes come last
                    gemma_folder.check_json(part, repo, OTHER_MODEL)
                if not ((part / file.rfilename).exists() and is_intact(part / file.rfilename, file)):
                    download_file(repo, commit, file, part, bar)
        check_complete(repo, part)
        folders.write_origin(part, commit, repo)
        atomic.move_into_place(part, target, "config.json")
    except (httpx2.HTTPError, OSError) as error:
        raise explain(error, repo, RETRY if part.is_dir() and any(part.iterdir()) else AGAIN) from error


def part_folder(target, files):
    """Return the folder in which the resolved `target` is downloaded: ours, or not there yet.

    Ours is one that is marked or that, as before there were marks, holds a file to resume and no stranger's.
    """
    hidden = "." if output_folder.is_fixed(target) else ""  # in the target itself
    first = output_folder.work_folder(target) / f"{hidden}{target.name}.part"
    whole = {file.rfilename for file in files}
    halves = {incomplete_path(first, file).name for file in files}

    def is_ours(part):
        names = {path.name for path in part.iterdir()} if part.is_dir() else set()
        return output_folder.is_marked(part) or (names & halves and names <= whole | halves)

    paths = chain([first], output_folder.numbered_names(first))
    return next(path for path in paths if not os.path.lexists(path) or is_ours(path))


def present_bytes(part, file):
    """Return how many bytes of a file are in the folder `part`: of the whole one, or of one to resume.

    One with more than the file is of something else; for more than its end the hub answers 416.
    """
    for path in (part / file.rfilename, incomplete_path(part, file)):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= file.size:
            return path.stat().st_size
    return 0


def incomplete_path(part, file):
    return part / (file.rfilename + ".incomplete")


def download_file(repo, commit, file, part, bar):
    """Download one file of a commit into the folder `part`, resuming `<file>.incomplete` if it is there.

    huggingface_hub 2.4's own downloads throw away a file that was not finished, and here that can be 5 GB;
    its `http_get` asks for the rest of one.
    """
    incomplete = incomplete_path(part, file)
    (part / file.rfilename).unlink(missing_ok=True)  # not intact
    if not present_bytes(part, file):
        incomplete.unlink(missing_ok=True)
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
        raise UserError(f"{repo}: {file.rfilename}: checksum mismatch; file deleted, {RETRY}")
    atomic.fsync_tree(incomplete)
    atomic.rename_synced(incomplete, part / file.rfilename)


def check_complete(repo, folder):
    """Raise UserError if the folder that `repo` was downloaded into is not a complete model."""
    if missing := folders.missing_files(folder):
        raise UserError(f"{repo}: has no {', '.join(missing)}; {OTHER_MODEL}")


def fetch(repo, commit=None):
    """Return the folder (a string) of model `repo` in huggingface_hub's cache, downloading it if need be.

    commit: which version, None for the newest. No network is used if the cache has all of it.
    Raise UserError.
    """
    wanted = {"allow_patterns": NEEDED, "ignore_patterns": NOT_NEEDED, "revision": commit}
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
        small = snapshot_download(repo, **wanted | {"allow_patterns": list(gemma_folder.JSON_FILES)})
        gemma_folder.check_json(small, repo, OTHER_MODEL)  # before gigabytes of another model
        files = snapshot_download(repo, **wanted, dry_run=True)
        needed = sum(file.file_size for file in files if file.will_download)
        folders.check_free_disk(Path(HF_HUB_CACHE), needed + RESERVE)
        folder = snapshot_download(repo, **wanted)
    except (httpx2.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's
        raise explain(error, repo) from error
    check_complete(repo, folder)
    return folder
