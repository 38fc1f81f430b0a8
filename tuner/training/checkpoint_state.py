"""What training needs to go on, as the bytes of a checkpoint; written in a thread beside training."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from tuner.system.console import print_main, printable
from tuner.system.errors import UserError
from tuner.training import adapter_weights
from tuner.training.checkpoints import OPTIMIZER, WEIGHTS, write_checkpoint


class CheckpointWriter:
    """Writes checkpoints beside training; leaving it waits for the last one, however it is left.

    A checkpoint that cannot be written is reported, and training goes on without it.
    """

    def __init__(self, output, config, run_identity):
        """config: a PeftConfig; run_identity: what a manifest says of its run, as it stands."""
        self.output, self.config, self.run_identity = output, config, run_identity
        self.pool, self.pending = ThreadPoolExecutor(max_workers=1), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._wait()
        self.pool.shutdown()

    def save(self, history, weights, states):
        """Write a checkpoint of weights that will not change; `states` are copied first.

        weights are {name: tensor}; states are dicts and lists that torch can save and load with weights_only.
        """
        manifest = deepcopy({**self.run_identity, "step": len(history["losses"]), "history": history})
        states = copy_to_cpu(states)
        self._wait()
        writing = self.pool.submit(self._write, manifest, weights, states)
        self.pending = manifest["step"], writing

    def _write(self, manifest, weights, states):
        files = {WEIGHTS: adapter_weights.to_safetensors(weights), OPTIMIZER: to_pickle(states)}
        write_checkpoint(self.output, self.config, manifest, files)

    def _wait(self):
        if self.pending is None:
            return
        (step, writing), self.pending = self.pending, None
        try:
            writing.result()
        except OSError as error:
            reason = f"could not be written ({error.strerror})"
            print_main(f"warning    the checkpoint of step {step} {reason}; training goes on without it")


def copy_to_cpu(value):
    """Return dicts and lists as they are, the tensors in them as copies on the CPU."""
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copy_to_cpu(item) for item in value]
    return value.detach().to("cpu", copy=True) if hasattr(value, "detach") else value


def to_pickle(states):
    """Return states as the bytes of a file that torch.load reads with weights_only."""
    stream = io.BytesIO()
    torch.save(states, stream)
    return stream.getvalue()


def restore(checkpoint, weights, optimizer, schedule):
    """Copy a checkpoint's weights into the tensors {name: tensor}, and set optimizer and schedule.

    Return its history. Raise UserError if the checkpoint does not fit.
    """
    history, files = checkpoint.history, checkpoint.files
    try:
        saved = load(files[WEIGHTS])
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in weights.items()}:
            raise ValueError("its adapter has other tensors")
        states = torch.load(io.BytesIO(files[OPTIMIZER]), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(states["optimizer"])
        schedule.load_state_dict(states["schedule"])
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError) as error:
        which = f"the checkpoint of step {checkpoint.step}"
        reason = printable(str(error), 100)
        raise UserError(f"{which} does not fit ({reason}); start afresh with --overwrite") from error
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    return history
