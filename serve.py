"""Step 6: serve the tuned model here: OpenAI's chat completions with tool_calls, and a page to try it on.

    python serve.py                            gemma-3-4b-it-merged, what merge.py left
    python serve.py --adapter qlora_output     tuned and base beside each other, not merged

It listens on this machine only. To be reached from others it needs --host, and a key in SERVE_API_KEY.
"""

import argparse
from pathlib import Path

from train_qlora import OUTPUT_DIR, quantization_config
from tuner.inference.probes import PROBES, load_questions
from tuner.model import folders, gemma_folder
from tuner.serving import listening
from tuner.system import commands, console, signals
from tuner.system.errors import UserError
from tuner.system.libraries import heavy_imports
from tuner.system.scripts import run_script
from tuner.training import adapter_folder

MODEL = Path(folders.BASE_FOLDER).name + "-merged"
OUT_OF_MEMORY = "close what else runs on the GPU (nvidia-smi), or add --bits 4"


def port_number(text):
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError("expected a port number up to 65535, or 0 for any free port")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Serve the tuned model as OpenAI's chat completions, with a page to try it on.",
        epilog=f"If {listening.KEY} is set, clients have to send it as their API key.",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--model", default=MODEL, help="folder of a merged model (default: %(default)s)")
    choice.add_argument(
        "--adapter", help="folder of an adapter, to serve tuned and base without merging (default: none)"
    )
    parser.add_argument(
        "--base", help="folder or hub name of the adapter's base (default: as the adapter records it)"
    )
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], help="bits to quantize the model to (default: unquantized)"
    )
    parser.add_argument(
        "--probes", default=PROBES, help="file of rows to ask by buttons (default: %(default)s, if it exists)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=port_number,
        default=8000,
        help="port to listen on, 0 for any free port (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.base and not args.adapter:
        parser.error("--base names the base of an adapter; add --adapter")
    return args


def check_model(args):
    """Raise UserError if the folder that is to be served holds no adapter, or no complete merged model."""
    if args.adapter:
        adapter_folder.read_adapter(args.adapter)
        return
    folder = Path(args.model)
    if not folder.is_dir():
        adapter = f"python serve.py --adapter {OUTPUT_DIR}"
        raise UserError(
            f"{folder} does not exist; create it: python merge.py, or serve the adapter: {adapter}"
        )
    if adapter_folder.is_finished(folder):
        serve_it = commands.command("serve.py", adapter=folder)
        raise UserError(f"{folder} is an adapter; serve it on its base: {serve_it}")
    gemma_folder.check(folder, folder, "check --model, or merge again")


def read_probes(path):
    """Return the Questions that are the page's buttons; None without a file of the default name."""
    is_missing = path == PROBES and not Path(path).exists()
    return None if is_missing else load_questions(path, "--probes")


def print_addresses(listener, key):
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"API        {url}/v1, {f'with the key in {listening.KEY}' if key else 'without a key'}")
    print(f"page       {url}/ in a browser; Ctrl-C stops")


def main():
    args = parse_arguments()
    signals.exit_on_signals("stopped")
    console.ignore_broken_pipes()
    key = listening.read_key()
    probes = read_probes(args.probes)
    with listening.listen(args.host, args.port, key) as listener:
        source = console.one_line(args.adapter or args.model)
        print(f"loading    {source}")
        check_model(args)
        with heavy_imports():  # torch and what stands on it: seconds, so flags and folder are checked first
            from tuner.inference import generation
            from tuner.serving import http_server
            from tuner.system import devices

        if args.adapter:
            tuned = generation.load_tuned(args.adapter, args.bits, quantization_config, args.base)
            model, tokenizer, _ = tuned
            names = ["tuned", "base"]
        else:
            model, tokenizer = generation.load_model(args.model, args.model, args.bits, quantization_config)
            names = [console.printable(Path(args.model).resolve().name)]

        def announce():
            bits = f"in {args.bits} bits" if args.bits else "unquantized"
            device = devices.device_name(model.device)
            print(f"models     {', '.join(names)}: {source}, {bits}, on {device}")
            print_addresses(listener, key)

        service = http_server.ChatService(model, tokenizer, names, key, probes)
        http_server.handle_hangup()
        http_server.Server(service, announce).run(sockets=[listener])


if __name__ == "__main__":
    run_script(main, out_of_memory=OUT_OF_MEMORY)
