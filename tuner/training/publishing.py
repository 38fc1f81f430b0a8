"""Push a merged model or an adapter to the hub: after asking, privately, with no path or row of the user."""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from tuner.model import folders, gemma_folder, locate, repository
from tuner.system import commands, signals
from tuner.system.console import one_line
from tuner.system.errors import UserError
from tuner.training import adapter_folder, model_card
from tuner.training.checkpoints import CONFIG, WEIGHTS

NOT_PUSHED = "stopped; nothing was pushed"
# The flags of the command that does again what failed once the model was merged, a GGUF or a push.
REPEATED = ("adapter", "base", "probes", "output", "gguf", "adapter_only", "push_to_hub", "public")
# What libraries write into configs of the folder that they read: a path of this machine, or a hub's name.
NAMES_OF_FOLDERS = ("_name_or_path", "name_or_path")


def check_flags(parser, args):
    """Return the arguments with `repeat`, the command for the rest again; exit with 2 if they are wrong."""
    if args.push_to_hub is None:
        for flag in ("public", "adapter_only"):
            if getattr(args, flag):
                parser.error(f"--{flag.replace('_', '-')} needs --push-to-hub")
    elif fault := repository.name_fault(args.push_to_hub):
        parser.error(f"--push-to-hub {fault}")
    if args.adapter_only and (args.output or args.overwrite):
        parser.error("--adapter-only writes no folder; leave out --output and --overwrite")
    typed = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    args.repeat = commands.command("merge.py", **{name: typed.get(name) for name in REPEATED})
    return args


# ------------------------------------------------------------------------------------------ what is pushed


def merged_files(folder, patterns):
    """Return {name: path or bytes} of a merged model's files; run.json, which tells of rows, stays here."""
    gemma_folder.check_links(folder, folder)
    paths = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
    names = [path.name for path in paths if any(path.match(pattern) for pattern in patterns)]
    return {name: without_paths(Path(folder, name)) for name in names if name != adapter_folder.RUN}


def adapter_files(args, config, run, comparison):
    """Return {name: path or bytes} of what others need of an adapter, with a card and the base's name."""
    name = base_name(args, config, run)
    card = model_card.model_card(name, run.get("revision"), run, comparison, adapter=True)
    folder = Path(args.adapter)
    gemma_folder.check_links(folder, folder)
    files = {file: folder / file for file in (WEIGHTS, *adapter_folder.TOKENIZER)}
    files = {file: without_paths(path) for file, path in files.items() if path.is_file()}
    made = {CONFIG: json.dumps({**config, "base_model_name_or_path": name}, indent=2) + "\n"}
    made |= {"README.md": card, "NOTICE": model_card.NOTICE}
    return files | {file: text.encode() for file, text in made.items()}


def base_name(args, config, run):
    """Return what an adapter's base is called on the hub: a path here would say nothing to others."""
    recorded = config["base_model_name_or_path"]
    base = args.base or locate.find_recorded(recorded, args.adapter, locate.hub_commit(run))
    name = folders.hub_name(base) if locate.is_local(base) else base
    if name is None:
        where = f"the base of {args.adapter} is {base}, which does not say its name on the hub"
        raise UserError(f"{where}; add --base {folders.BASE_MODEL}, or what its name is")
    return name


def without_paths(path):
    """Return a file's path, or its content as bytes if it is a config that names folders of this machine."""
    if path.name not in gemma_folder.JSON_FILES:
        return path
    values = gemma_folder.read_json(path, path.parent)
    cleaned = drop_paths(values)
    return path if cleaned == values else (json.dumps(cleaned, ensure_ascii=False, indent=2) + "\n").encode()


def drop_paths(value):
    """Return JSON values without the keys whose value is a folder or file of a machine."""

    def is_path(key, item):
        is_name = key in NAMES_OF_FOLDERS and isinstance(item, str) and not folders.HUB_NAME.fullmatch(item)
        return is_name or (isinstance(item, str) and os.path.isabs(item) and len(Path(item).parts) > 2)

    if isinstance(value, dict):
        return {key: drop_paths(item) for key, item in value.items() if not is_path(key, item)}
    return [drop_paths(item) for item in value] if isinstance(value, list) else value


def weights_size(model):
    """Return how many bytes a model's weights take in bf16, None if it is not a folder here."""
    is_here = locate.is_local(model) and not folders.missing_files(model)
    return gemma_folder.bf16_bytes(model) if is_here else None


# --------------------------------------------------------------------------------------- asking and pushing


class Push:
    """What is to be pushed where: found out before anything is merged, agreed to, then done."""

    def __init__(self, args):
        """Ask the hub for the repository; raise UserError if it cannot be written."""
        self.args = args
        self.repository = repository.find(args.push_to_hub, args.public)

    def agree(self, what, size, names):
        """Ask whether to push, where there is a terminal, and create the repository; raise UserError on no.

        what: the folder; size: in bytes, None if it is not known yet; names: of the files, patterns too.
        """
        repository.check_kind(self.repository, names)
        size = f" ({shown_size(size)})" if size else ""
        text = f"{one_line(str(what))}{size} to {self.repository.describe()}"
        terminal = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
        if terminal and sys.stdin.isatty():
            print(f"push {text}? [y/N]", end=" ", file=terminal, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise UserError("nothing was merged or pushed; answer y to push")
        elif self.repository.files is not None and not (self.repository.private or self.args.public):
            name = self.repository.name
            raise UserError(f"{name} is public; add --public if everybody may have this model")
        else:
            print(f"pushing    {text}", flush=True)
        self.repository = repository.create(self.repository)

    def upload(self, folder, files, patterns):
        """Push files, {name: path or bytes}, of a folder; on a failure say how to push them again."""
        again = f"push {folder} again: {self.args.repeat}"
        with interruptible(f"stopped; {again}"):
            repository.upload(self.repository, files, patterns, again)
        size = shown_size(sum(map(content_size, files.values())))
        print(f"pushed     {self.repository.page} ({self.repository.visibility}), {size}", flush=True)


def push_adapter(args, config, run, comparison):
    """Push an adapter as it is, unmerged."""
    with interruptible(NOT_PUSHED):
        files = adapter_files(args, config, run, comparison)
        push = Push(args)
        push.agree(args.adapter, sum(map(content_size, files.values())), files)
    push.upload(args.adapter, files, (CONFIG, WEIGHTS, *adapter_folder.TOKENIZER))


@contextmanager
def interruptible(message):
    """Print a message of its own if Ctrl-C or a signal ends the process in the body."""
    signals.exit_on_signals(message)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{message}", file=sys.stderr)
        sys.exit(130)


def content_size(content):
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def shown_size(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
