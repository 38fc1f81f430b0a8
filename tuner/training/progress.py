"""What a run has done so far: losses, evaluations; what its checkpoints hold."""

import math
import time

import torch
from peft import get_peft_model_state_dict
from tqdm import tqdm

from tuner.data import splitting
from tuner.system.errors import UserError
from tuner.training import checkpoint_state, flat_weights

# Ours: a loss this many times that of guessing evenly, or of the first step, ends the run.
MAX_LOSS_RATIO = 1.5


class Progress:
    """The history of a run and its bar.

    history: a dict as run.json has it. save(history, adapter, states) writes a checkpoint of it
    (CheckpointWriter.save); None in a launcher's other processes.
    """

    def __init__(self, model, weights, optimizers, steps, recipe):
        """weights: all that is trained, one tensor (flat_weights); optimizers: (optimizer, schedule); steps:
        of the whole run.
        """
        self.adapter = get_peft_model_state_dict(model)  # the weights themselves, by name
        self.weights, self.recipe = weights, recipe
        self.optimizer, self.schedule = optimizers
        self.guessing_loss = math.log(model.config.get_text_config().vocab_size)
        self.history = {
            "steps": steps,
            "warmup_steps": splitting.warmup_steps(steps, recipe),
            "losses": [],
            "evaluations": [],
            "resumed_at": [],
            "seconds": 0.0,
            "step_seconds": [],
        }
        self.save, self.bar = None, None
        self.step, self.resumed_after = 0, 0  # steps counted, and those that a resumed run had done before
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def resume(self, checkpoint):
        """Go on from a Checkpoint; raise UserError if it does not fit."""
        self.history = checkpoint_state.restore(checkpoint, self.adapter, self.optimizer, self.schedule)
        self.resumed_after = self.steps_done
        self.history["resumed_at"].append(self.resumed_after)
        self.seconds_before = self.history["seconds"]

    @property
    def steps_done(self):
        return len(self.history["losses"])

    def show(self, is_main_process):
        """Return the run's progress bar, to be entered."""
        self.bar = tqdm(
            total=self.history["steps"],
            initial=self.steps_done,
            desc="training",
            unit="step",
            disable=not is_main_process,
            dynamic_ncols=True,
        )
        return self.bar

    def start_step(self):
        """Count a step; return whether it is still to be done."""
        self.step += 1
        self.step_started = time.perf_counter()
        return self.step > self.resumed_after

    def epoch_is_over(self, epoch, evaluates):
        """Return whether a resumed run had ended this epoch before, its evaluation included."""
        return len(self.history["evaluations"]) >= epoch if evaluates else self.step <= self.resumed_after

    def add_step(self, loss):
        """Record a step's loss and its seconds."""
        self.history["losses"].append(loss)
        self.history["step_seconds"].append(round(time.perf_counter() - self.step_started, 4))
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()

    def add_evaluation(self, epoch, evaluation):
        """Record an Evaluation."""
        self.history["evaluations"].append({"epoch": epoch, "step": self.step, **evaluation._asdict()})

    def check_loss(self, loss, gradient_norm):
        """Raise UserError if a step's loss or gradient is not finite, or the loss explodes."""
        self.check("loss", loss, MAX_LOSS_RATIO * max([self.guessing_loss, *self.history["losses"][:1]]))
        self.check("gradient", gradient_norm, math.inf)

    def check_validation_loss(self, loss):
        """Raise UserError if a validation loss is not finite, or explodes."""
        limit = MAX_LOSS_RATIO * max(self.guessing_loss, self.history["losses"][0])
        self.check("validation loss", loss, limit)

    def check(self, what, value, limit):
        if math.isfinite(value) and value <= limit:
            return
        learning_rate = self.recipe.learning_rate
        cause = f"the learning rate {learning_rate:g} is too high"
        cure = f"start afresh with --overwrite --learning-rate {learning_rate / 10:g}"
        if self.step == 1:
            cause, cure = "the base model's weights are damaged", "download them again"
        problem = "explodes" if math.isfinite(value) else "is not finite"
        raise UserError(f"step {self.step}: the {what} ({value:.4g}) {problem}; most likely {cause}: {cure}")

    def save_checkpoint(self):
        """Write a checkpoint, if this process writes any."""
        if self.save is None:
            return
        self.update_seconds()
        states = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        adapter = flat_weights.copy_to_cpu(self.adapter, self.weights)
        self.save(self.history, adapter, states)

    def finish(self):
        """Return the history of the whole run."""
        self.update_seconds()
        return self.history

    def update_seconds(self):
        self.history["seconds"] = round(self.seconds_before + time.perf_counter() - self.started, 1)


def any_stop_requested(stop_request, state):
    """Return whether any of the processes was asked to stop."""
    if state.num_processes == 1:
        return bool(stop_request)
    flag = torch.tensor(float(bool(stop_request)), device=state.device)
    torch.distributed.all_reduce(flag)
    return flag.item() > 0
