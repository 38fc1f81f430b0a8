"""Heavy libraries are imported once, quickly, and never by what is to answer within a second."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH_FREE = sorted(
    f"tuner.{path.parent.name}.{path.stem}"
    for room, with_torch in [("system", ["devices"]), ("data", ["tokenized"])]
    for path in (ROOT / "tuner" / room).glob("[!_]*.py")
    if path.stem not in with_torch
)
TORCH_FREE += [f"tuner.model.{name}" for name in ("folders", "hub", "locate", "access")]
TORCH_FREE += [f"tuner.inference.{name}" for name in ("probes", "judging", "report", "endpoint")]
TORCH_FREE += [
    f"tuner.training.{name}"
    for name in ("memory_plan", "checkpoints", "adapter_folder", "model_card", "cost")
]
SCRIPTS = ["train_qlora", "compare", "merge", "check", "download_model", "serve"]


def run(code, *interpreter_flags):
    command = [sys.executable, *interpreter_flags, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_heavy_imports_leave_garbage_alone_and_look_for_it_again_after_them():
    code = "import gc, sys; from tuner.system import libraries\n"
    code += "with libraries.heavy_imports():\n import peft\n print(gc.isenabled())\n"
    code += "print('transformers.models.gemma3.modeling_gemma3' in sys.modules, gc.isenabled())\n"
    code += "count = gc.get_freeze_count()\n"
    code += "with libraries.heavy_imports():\n print(gc.isenabled())\n"
    code += "print(count > 10_000, gc.get_freeze_count() == count)"
    assert run(code).split() == ["False", "True", "True", "True", "True", "True"]


@pytest.mark.parametrize("names", [TORCH_FREE, SCRIPTS], ids=["modules", "scripts"])
def test_what_answers_within_a_second_imports_nothing_heavy(names):
    code = f"import sys, importlib\nfor name in {names}:\n importlib.import_module(name)\n"
    code += "print([n for n in ('torch', 'transformers', 'datasets', 'bitsandbytes', 'peft', 'matplotlib')"
    code += " if n in sys.modules])"
    assert run(code) == "[]\n"
