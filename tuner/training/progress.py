"""What a run has done so far: losses, evaluations, the best adapter; what its checkpoints hold."""

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
    """The history of a run, its best adapter and its bar.

    history: a dict as run.json has it. save(history, adapter, best, states) writes a checkpoint of it
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
            "kept_step": steps,
            "losses": [],
            "evaluations": [],
            "resumed_at": [],
            "seconds": 0.0,
            "step_seconds": [],
        }
        self.best, self.save, self.bar = None, None, None
        self.step, self.resumed_after = 0, 0  # steps counted, and those that a resumed run had done before
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def resume(self, checkpoint):
        """Go on from a Checkpoint; raise UserError if it does not fit."""
        self.history, self.best = checkpoint_state.restore(
            checkpoint, self.adapter, self.optimizer, self.schedule
        )
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
        """Record an Evaluation; keep the adapter if it is the best one (rank)."""
        earlier, new = self.history["evaluations"], evaluation._asdict()
        if all(rank(new) < rank(e) for e in earlier):
            self.best = flat_weights.copy_to_cpu(self.adapter, self.weights)
            self.history["kept_step"] = self.step
        earlier.append({"epoch": epoch, "step": self.step, **new})

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
        best = self.best if self.history["kept_step"] != self.step else None
        self.save(self.history, adapter, best, states)

    def finish(self):
        """Put the best adapter into the model; return the history."""
        if self.best:
            with torch.no_grad():
                for name, weight in self.adapter.items():
                    weight.copy_(self.best[name])
        self.update_seconds()
        return self.history

    def update_seconds(self):
        self.history["seconds"] = round(self.seconds_before + time.perf_counter() - self.started, 1)


def rank(evaluation):
    """Return what sorts evaluations, the best first: by most rows right, then named, decided; least loss."""
    right, loss = evaluation["right"], evaluation["loss"]
    # An earlier version's checkpoint has neither of the two.
    named, decided = (evaluation.get(key, right) for key in ("named", "decided"))
    return -right, -named, -decided, loss


def any_stop_requested(stop_request, state):
    """Return whether any of the processes was asked to stop."""
    if state.num_processes == 1:
        return bool(stop_request)
    flag = torch.tensor(float(bool(stop_request)), device=state.device)
    torch.distributed.all_reduce(flag)
    return flag.item() > 0
