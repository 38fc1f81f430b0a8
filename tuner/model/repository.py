"""A model's repository on the hub that is written to: who may, what is in it, and one commit to it."""

import logging
import re
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import PurePosixPath
from typing import NamedTuple

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from tuner.model import hub
from tuner.system.console import printable
from tuner.system.errors import UserError

LOGIN = f"create one that may write at {hub.TOKENS_PAGE}, then `hf auth login` or set HF_TOKEN"
# A file of the one makes the other another model: transformers puts an adapter beside a model on it.
OTHER_KIND = {"config.json": "a whole model", "adapter_config.json": "an adapter"}

HF_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")  # a ConnectionError's text, of hf_xet 1.8


class Repository(NamedTuple):
    name: str  # with its owner
    private: bool  # what it is, or will be
    files: tuple = None  # the names of those in it; None for a repository that is not there yet

    @property
    def visibility(self):
        return "private" if self.private else "public"

    @property
    def page(self):
        return f"{constants.ENDPOINT}/{self.name}"

    def describe(self):
        """Return its name, and in words whether it is there and who may read it."""
        if self.files is None:
            return f"{self.name}, a new {self.visibility} repository"
        is_full = any(name in self.files for name in OTHER_KIND)
        what = " and whose model is replaced" if is_full else ""
        return f"{self.name}, a {self.visibility} repository that exists{what}"


# -------------------------------------------------------------------------------------------- errors


def name_fault(name):
    """Return why a repository cannot be called so, None if it can."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"{printable(name)!r} is no name of a repository; example: your-name/bank-calls"
    return None


@contextmanager
def explained(name, again=hub.AGAIN):
    """Raise what huggingface_hub raises in the body about a repository as a UserError of one line.

    again: what to do once the cause is gone.
    """
    # Its warnings are about retries, and about errors, which are explained here.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
        # RuntimeError: hf_xet's, or an upload's in a thread, which has its cause.
        raise explain(error, name, again) from error


def explain(error, name, again):
    """Return the UserError for what was raised while a repository was asked for or written."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if isinstance(cause, OfflineModeIsEnabled):
        return UserError(f"{name}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to push", "hub")
    if "metadata in README.md" in str(cause):
        return UserError(f"{name}: the hub rejects the head of README.md; correct it, then {again}", "hub")
    status, words = status_of(cause), server_words(cause)
    if status is None:
        return hub.explain(cause, name, again)
    if status == 401:
        return UserError(f"{name}: the hub rejected your token (401); {LOGIN}", "token")
    if status == 403:
        return UserError(f"{name}: your token may not write it (403{words}); {LOGIN}, then {again}", "token")
    return UserError(
        f"{name}: error of the hub (HTTP {status}{words}); wait a few minutes, then {again}", "hub"
    )


def status_of(error):
    """Return the HTTP status that an error is about, None if it is about none."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    found = HF_XET_STATUS.search(str(error))
    return int(found[1]) if found else None


def server_words(error):
    """Return what the hub said beside a status, such as that storage is full: a colon and text, or ""."""
    words = getattr(error, "server_message", None) or ""
    if token := get_token():
        words = words.replace(token, "…")
    return f": {printable(words, 150).strip().rstrip('.')}" if words else ""


# ------------------------------------------------------------------------------------------- asking


def find(name, public):
    """Return the Repository of a name: as it is on the hub, or as it will be created.

    A name without an owner is the token's user's. Raise UserError if there is no token, if it is not valid or
    may only read, or if the hub cannot be reached.
    """
    if not get_token():
        raise UserError(f"{name}: no token; {LOGIN}", "token")
    with explained(name):
        account = whoami()
        role = (((account.get("auth") or {}).get("accessToken")) or {}).get("role")
        if role == "read":
            raise UserError(f"{name}: your token may only read; {LOGIN}", "token")
        name = name if "/" in name else f"{account['name']}/{name}"
        try:
            repository = read(name)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Repository(name, not public)
        HfApi().auth_check(name, write=True)
    return repository


def whoami():
    """Return what the hub says of the token; HfApi's own would wait for ever for a hub that is silent."""
    url = f"{constants.ENDPOINT}/api/whoami-v2"
    response = get_session().get(url, headers=build_hf_headers(), timeout=hub.CHECK_TIMEOUT)
    hf_raise_for_status(response)
    return response.json()


def read(name):
    """Return the Repository of this name as it is on the hub."""
    info = HfApi().model_info(name, timeout=hub.CHECK_TIMEOUT)
    return Repository(name, info.private is True, tuple(file.rfilename for file in info.siblings or ()))


def check_kind(repository, names):
    """Raise UserError if files of these names would make a model of an adapter's repository, or reversed."""
    for name, kind in OTHER_KIND.items():
        if name not in names and name in (repository.files or ()):
            raise UserError(f"{repository.name} holds {kind}; name another repository")


# ------------------------------------------------------------------------------------------ writing


def create(repository):
    """Create a repository that is not there yet; return it. Raise UserError, also if it is not private."""
    if repository.files is not None:
        return repository
    with explained(repository.name):
        HfApi().create_repo(repository.name, private=repository.private, exist_ok=True)
        created = read(repository.name)
    if repository.private and not created.private:
        settings = f"{repository.page}/settings"
        raise UserError(f"{repository.name}: the hub made it public; make it private: {settings}", "hub")
    return created


def upload(repository, files, replaced, again):
    """Upload files to a repository in one commit: it has the earlier state of them or this one, no third.

    files: {name: path, or bytes}. replaced: patterns of names; what the repository has of them beside
    `files` is removed. again: what to do once the cause of a failure is gone. Raise UserError.
    """
    with explained(repository.name, again), nullcontext() if sys.stderr.isatty() else disable_progress_bars():
        stale = [
            name
            for name in repository.files or ()
            if name not in files and any(PurePosixPath(name).match(pattern) for pattern in replaced)
        ]
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in stale if "/" not in name]
        # Not upload_folder: with hf_xet, that makes several commits.
        HfApi().create_commit(repository.name, operations, commit_message="Upload model")
