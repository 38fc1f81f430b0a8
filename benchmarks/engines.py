"""Serve a merged model by every engine that is installed, one after the other, and judge what each answers.

    python benchmarks/engines.py --merged gemma-3-270m-merged

serve.py and transformers serve are here; VLLM, LLAMA_SERVER and OLLAMA name the programs of the others
(CONTRIBUTING.md says how to get them; llama-quantize is sought beside llama-server). Each is asked what
compare.py --endpoint asks, and its answers are compared with those of serve.py. Writes the table of
docs/serving.md, or of the file that --results names.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.run import replace_section  # noqa: E402
from tuner.inference import endpoint, judging, rates  # noqa: E402
from tuner.inference.probes import HELD_OUT, PROBES, load_all  # noqa: E402
from tuner.model import gguf_writing  # noqa: E402
from tuner.system.errors import UserError  # noqa: E402

RESULTS = ROOT / "docs/serving.md"
START_TIMEOUT = 600  # seconds; vLLM on a busy CPU takes some two minutes
PLUGIN = ROOT / "tuner/serving/vllm_tool_parser.py"


class Engine(NamedTuple):
    """An engine, and how it is started on {model}, the folder or .gguf, at {port}."""

    name: str
    command: list  # of strings
    variable: str | None = None  # of the environment: names the engine's program, {program} in the command
    gguf: str | None = None  # what it serves is a .gguf of this type
    parses: bool = True  # whether calls come as tool_calls


HERE = [sys.executable, str(ROOT / "serve.py"), "--model", "{model}", "--port", "{port}"]
TRANSFORMERS = [str(Path(sys.executable).with_name("transformers")), "serve", "{model}", "--port", "{port}"]
VLLM = ["{program}", "serve", "{model}", "--port", "{port}", "--max-model-len", "2048", "--enforce-eager"]
VLLM += ["--enable-auto-tool-choice", "--tool-call-parser"]
LLAMA_CPP = ["{program}", "-m", "{model}", "--port", "{port}", "--jinja", "--skip-chat-parsing"]
ENGINES = [
    Engine("serve.py", HERE),
    Engine("transformers serve", TRANSFORMERS),
    Engine("vLLM, hf", [*VLLM, "hf"], "VLLM"),
    Engine("vLLM, our plugin", [*VLLM, "tool_call_tag", "--tool-parser-plugin", str(PLUGIN)], "VLLM"),
    *(
        Engine("llama.cpp", LLAMA_CPP, "LLAMA_SERVER", kind, parses=False)
        for kind in ("bf16", "q8_0", "Q4_K_M")
    ),
]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; without a GPU


class Outcome(NamedTuple):
    """What an engine answered to all questions."""

    engine: Engine
    replies: endpoint.Replies
    figures: dict  # of the held-out rows, as rates.count has them
    passed: int  # probes


def title(engine):
    return f"{engine.name}, {engine.gguf}" if engine.gguf else engine.name


def program(engine):
    """Return the path of an engine's program, None if it is not installed."""
    path = os.environ.get(engine.variable, "") if engine.variable else engine.command[0]
    return path if path and os.access(path, os.X_OK) else None


def model_for(engine, merged, folder):
    """Return the path of what an engine serves of the merged model, a .gguf if need be made in `folder`.

    Raise UserError if that fails.
    """
    if not engine.gguf:
        return Path(merged).absolute()
    path = Path(folder, f"{engine.gguf}.gguf")
    if engine.gguf in gguf_writing.QUANTIZATIONS:
        path.with_suffix("").symlink_to(Path(merged).absolute())
        gguf_writing.write_gguf(path.with_suffix(""), engine.gguf, "")
        return path
    whole = Path(folder, "bf16.gguf")
    if not whole.exists():
        model_for(engine._replace(gguf="bf16"), merged, folder)
    quantize = Path(os.environ["LLAMA_SERVER"]).with_name("llama-quantize")
    command = [quantize, whole, path, engine.gguf]
    if not quantize.exists() or subprocess.run(command, capture_output=True).returncode:
        raise UserError(f"{quantize} makes no {engine.gguf}")
    return path


@contextmanager
def serving(engine, model, log):
    """Start an engine on `model` at a free port; yield the address of its /v1, and stop it.

    log: the file for what it prints. Raise UserError if it ends, or is not ready within START_TIMEOUT.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"program": program(engine), "model": str(model), "port": port}
    command = [word.format(**values) for word in engine.command]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", engine, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process, address, engine, log):
    started = time.monotonic()
    while time.monotonic() - started < START_TIMEOUT:
        if process.poll() is not None:
            lines = Path(log).read_text(errors="replace").strip().splitlines()
            raise UserError(f"{title(engine)} ended with {process.returncode}: {lines[-1] if lines else ''}")
        with suppress(httpx2.HTTPError):
            if httpx2.get(f"{address}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.5)
    raise UserError(f"{title(engine)} is not ready after {START_TIMEOUT} s; see {log}")


def judge(engine, model, questions, log):
    """Return the Outcome of an engine that serves `model`; questions: of the probes and the held-out rows."""
    # transformers serve lists what the hub's cache holds, not what it serves.
    named = str(model) if engine.name == "transformers serve" else None
    with serving(engine, model, log) as url:
        replies = endpoint.ask(url, named, questions)
    answers = [judging.Answer(reply.text, reply.ended, []) for reply in replies.replies]
    expected = [one for part in questions for one in part.expected]
    limits = [limit for part in questions for limit in part.max_new_tokens]
    verdicts = [judging.judge(*one) for one in zip(answers, expected, limits, strict=True)]
    probes = len(questions[0].lines)
    figures = rates.count(verdicts[probes:], expected[probes:])
    return Outcome(engine, replies, figures, sum(verdict.step is None for verdict in verdicts[:probes]))


# ----------------------------------------------------------------------------------------------- table


def row(outcome, reference):
    """Return a line of the table; reference: the Outcome whose answers are compared."""
    engine, replies, figures = outcome.engine, outcome.replies, outcome.figures
    decision, loop, stream = figures["decision"], replies.loop, replies.stream
    pairs = zip(replies.replies, reference.replies.replies, strict=True)
    same = sum(mine.text == theirs.text for mine, theirs in pairs)
    false, names = decision["false_call_rate"], figures["names"]
    cells = [
        engine.name,
        engine.gguf or "bf16",
        str(outcome.passed),
        f"{decision['f1']['value']:.2f}",
        f"{false['part']} of {false['whole']}",
        f"{names['part']} of {names['whole']}",
        f"{replies.parsed} / {replies.tagged}",
        "refused" if loop.refused else f"{loop.answered} of {loop.sent}",
        "refused" if stream.refused else f"{stream.same} of {stream.asked}",
        f"{same} of {len(replies.replies)}",
    ]
    return f"| {' | '.join(cells)} |"


HEADS = ["engine", "weights", "probes", "decision F1", "false calls", "right tools", "calls parsed / as text"]
HEADS += ["results answered", "streamed as whole", "answers as serve.py's"]


def table(outcomes):
    """Return the lines of the table; the first of the Outcomes is serve.py's, with which others compare."""
    rows = [row(outcome, outcomes[0]) for outcome in outcomes]
    return [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS), *rows]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--merged", default="gemma-3-270m-merged", help="a merged model (default: %(default)s)"
    )
    parser.add_argument("--results", default=RESULTS, help="file for the table (default: docs/serving.md)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    questions = load_all((ROOT / PROBES, "--probes"), (ROOT / HELD_OUT, "--data"))
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            if not program(engine):
                print(f"{title(engine)}: {engine.variable} names no program; left out", flush=True)
                continue
            try:
                model = model_for(engine, args.merged, folder)
                outcome = judge(engine, model, questions, Path(folder, "log"))
            except UserError as error:
                print(f"{title(engine)}: {error}", flush=True)
                continue
            outcomes.append(outcome)
            print(row(outcome, outcomes[0]), flush=True)
    if not outcomes or outcomes[0].engine is not ENGINES[0]:
        print("nothing is written: serve.py, which the others are compared with, gave no answers")
        return 1
    path = Path(args.results)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(replace_section(text, "engines", table(outcomes)), encoding="utf-8")
    print(f"written into {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
