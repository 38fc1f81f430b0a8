"""Step 6: serve the tuned model here: OpenAI's chat completions with tool_calls, and a page to try it on.

    python serve.py                            gemma-3-4b-it-merged, what merge.py left
    python serve.py --adapter qlora_output     tuned and base beside each other, not merged

It listens on this machine only. To be reached from others it needs --host, and a key in SERVE_API_KEY.
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

import uvicorn

import train_qlora
from tuner.inference import generation
from tuner.model import folders
from tuner.serving import http_server
from tuner.system import console, devices, libraries, scripts, signals
from tuner.system.console import printable
from tuner.system.errors import UserError
from tuner.training import adapter_folder

MODEL = Path(folders.BASE_FOLDER).name + "-merged"


# ---------------------------------------------------------------------------------------------- main


def load(args):
    """Returns (model, tokenizer, names of the models that it is); raises UserError."""
    if args.adapter:
        model, tokenizer, _ = generation.load_tuned(args.adapter, args.bits)
        return model, tokenizer, ["tuned", "base"]
    folder = Path(args.model)
    if not folder.is_dir():
        adapter = f"python serve.py --adapter {train_qlora.OUTPUT_DIR}"
        raise UserError(f"{folder} is not there; make it: python merge.py, or serve the adapter: {adapter}")
    if adapter_folder.is_finished(folder):
        raise UserError(f"{folder} is an adapter; serve it on its base: python serve.py --adapter {folder}")
    if missing := folders.missing_files(folder):
        raise UserError(f"{folder} is no complete model ({missing[0]} is missing); remove it and merge again")
    libraries.import_libraries()
    return *generation.load_model(str(folder), folder, args.bits), [printable(folder.resolve().name)]


def port_number(text):
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is no port; give a number up to 65535, 0 for any that is free"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Serve the tuned model as OpenAI's chat completions, with a page to try it on.",
        epilog=f"If {http_server.KEY} is set, clients have to send it as their API key.",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--model", default=MODEL, help="folder of a merged model (default: %(default)s)")
    choice.add_argument("--adapter", help="folder of an adapter: serve it on its base, and the base")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantise the model (default: unquantised)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=port_number, default=8000, help="port to listen on, 0 for any (default: %(default)s)"
    )
    return parser.parse_args()


def main():
    args = parse_arguments()
    signals.exit_on_signals("stopped")
    console.ignore_broken_pipes()
    try:
        run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not scripts.is_out_of_memory(error):
            raise
        print("the GPU's memory is full; close what else runs on it, or add --bits 4", file=sys.stderr)
        sys.exit(1)


def run(args):
    key = os.environ.get(http_server.KEY, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(f"{http_server.KEY} holds what no header can carry; take Latin letters and digits")
    with http_server.listen(args.host, args.port, key) as listening:
        print(f"loading    {args.adapter or args.model}")
        model, tokenizer, names = load(args)

        def announce():
            host, port = listening.getsockname()[:2]
            place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            bits = f"in {args.bits} bits" if args.bits else "unquantised"
            device = devices.device_name(model.device)
            print(f"models     {', '.join(names)}: {args.adapter or args.model}, {bits}, on {device}")
            print(
                f"API        {place}/v1, {f'with the key in {http_server.KEY}' if key else 'without a key'}"
            )
            print(f"page       {place}/ in a browser; Ctrl-C stops")

        jobs = {}
        server = http_server.make_server(
            http_server.make_app(model, tokenizer, names, key, jobs), jobs, announce
        )
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            uvicorn.server.HANDLED_SIGNALS += (signal.SIGHUP,)  # or its handler would break off the loop
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
