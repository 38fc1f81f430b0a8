"""Steps and epochs of a run: gradient, clipping, optimizer, evaluation, checkpoint."""

import sys
from contextlib import contextmanager
from typing import NamedTuple

from tuner.data import batching, splitting
from tuner.system import devices, libraries
from tuner.system.console import is_main_process, print_main
from tuner.system.errors import UserError
from tuner.training import accumulation, checkpoints, flat_weights, memory_plan
from tuner.training.accumulation import GradientAccumulator
from tuner.training.cuda_graphs import GraphAccumulator
from tuner.training.evaluation import Evaluator, pad_token_id, summary, told_apart
from tuner.training.optimizer import make_optimizer
from tuner.training.progress import Progress, any_stop_requested


class Stopped(Exception):
    """A run was asked to stop, and did after writing a checkpoint."""


class TrainingData(NamedTuple):
    tokenizer: object
    examples: list  # of all rows: dicts of input_ids and labels
    is_call: list  # whether a row ends with a call
    training: list  # row numbers
    validation: list  # row numbers, none in a small set


class Trainer:
    """Trains the LoRA weights of a model, step by step.

    stop_request: a signals.StopRequest, or anything that is true once the run is to stop; then `stopped` is
    true after `checkpointing`. step and end_epoch raise UserError if a loss is not finite or explodes, or the
    GPU's memory is full with one row.
    """

    def __init__(self, model, data, recipe, state, plan=None):
        """data: TrainingData; state: accelerate's PartialState; plan: a memory_plan.Plan, None on a CPU."""
        self.model, self.data, self.recipe, self.state = model, data, recipe, state
        self.stop_request, self.stopped = None, False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = flat_weights.flatten_parameters(self.parameters)
        self.steps_per_epoch = len(splitting.epoch_batches(data.training, 1, recipe))
        steps = recipe.epochs * self.steps_per_epoch
        warmup_steps = splitting.warmup_steps(steps, recipe)
        optimizers = make_optimizer(self.weights, recipe.learning_rate, steps, warmup_steps)
        self.optimizer, self.schedule = optimizers
        self.progress = Progress(model, self.weights, optimizers, steps, recipe)
        self.accumulator = self._make_accumulator(pad_token_id(data.tokenizer), plan)
        self.evaluator = self._make_evaluator(data.tokenizer, plan)
        model.train()

    def _make_accumulator(self, pad_id, plan):
        arguments = self.model, self.weights, pad_id, self.state
        if plan and plan.tokens:
            # As long as the real examples, without their tokens: there may be a hundred thousand.
            lengths = [
                {"input_ids": range(batching.length(e)), "labels": range(batching.trained_tokens([e]) + 1)}
                for e in self.data.examples
            ]
            epochs = range(1, self.recipe.epochs + 1)
            batches = (splitting.epoch_batches(self.data.training, epoch, self.recipe) for epoch in epochs)
            steps = [[lengths[i] for i in batch] for epoch in batches for batch in epoch]
            accumulator = GraphAccumulator(*arguments, plan)
            accumulator.expect(steps)
            return accumulator
        return GradientAccumulator(*arguments, plan.checkpointed if plan else memory_plan.MICRO_BATCH_TOKENS)

    def _make_evaluator(self, tokenizer, plan):
        """Return the Evaluator of the validation rows, None if there are none."""
        data = self.data
        if not data.validation:
            return None
        examples = [{**data.examples[i], "is_call": data.is_call[i]} for i in data.validation]
        return Evaluator(self.model, examples, tokenizer, self.state, plan)

    @contextmanager
    def checkpointing(self, writer, checkpoint, resume_command):
        """Resume from a Checkpoint, or begin (None), and write checkpoints while the body trains.

        Ends the body if a stop is requested. Whatever else ends it, say what is kept; UserError passes.
        """
        try:
            if checkpoint:
                self._check_evaluations(checkpoint)
                self.progress.resume(checkpoint)
            with writer, self.progress.show(is_main_process()):
                self.progress.save = writer.save if is_main_process() else None
                yield
        except Stopped:
            self.stopped = True
        except UserError as error:
            dirs = checkpoints.checkpoint_dirs(writer.output)
            kept = f"the last checkpoint is {dirs[0]}" if dirs else "no checkpoint was written yet"
            raise UserError(f"{error}; {kept}") from error
        except Exception:
            if is_main_process() and checkpoints.checkpoint_dirs(writer.output):
                print(f"the checkpoints are kept; resume with: {resume_command}", file=sys.stderr)
            raise
        self.state.destroy_process_group()

    def _check_evaluations(self, checkpoint):
        """Raise UserError if a Checkpoint's evaluations do not tell apart what this run's do."""
        counted = all("named" in e for e in checkpoint.history["evaluations"])
        if not counted and self.evaluator and told_apart(self.evaluator.calls):
            which = f"the checkpoint of step {checkpoint.step}"
            reason = "an earlier version wrote it, which counted no names"
            raise UserError(f"{which} does not fit ({reason}); start afresh with --overwrite")

    def step(self, batch):
        """Train on the rows of one step, given by their numbers; skip it if a resumed run had done it."""
        if not self.progress.start_step():
            return
        examples = [self.data.examples[i] for i in batch]
        seed = self.recipe.seed + self.progress.step * self.state.num_processes + self.state.process_index
        loss = self.accumulator.accumulate(examples, seed)
        loss = accumulation.all_reduce_step(loss, self.weights, self.state)
        norm = flat_weights.clip_gradient(self.weights, self.parameters, self.recipe.max_grad_norm)
        self.progress.check_loss(loss, norm.item())
        self.optimizer.step()
        self.schedule.step()
        self.progress.add_step(loss)
        if self.progress.step % self.steps_per_epoch and self._stop_requested():
            self.progress.save_checkpoint()
            raise Stopped

    def end_epoch(self, epoch):
        """Evaluate, write a checkpoint."""
        progress, epochs = self.progress, self.recipe.epochs
        if progress.epoch_is_over(epoch, bool(self.evaluator)):  # before the run was stopped
            return
        loss = progress.history["losses"][-1]
        line = f"epoch {epoch:>2}/{epochs}  step {progress.step:>3}  training loss {loss:.3f}"
        if self.evaluator:
            evaluation = self.evaluator.evaluate(self.stop_request)
            if evaluation is None:
                progress.save_checkpoint()
                raise Stopped
            progress.check_validation_loss(evaluation.loss)
            progress.add_evaluation(epoch, evaluation)
            line += f"  validation loss {evaluation.loss:.3f}"
            shown = summary(evaluation._asdict(), len(self.data.validation), self.evaluator.calls)
            line += "  validation " + ", ".join(f"{what} {count}/{whole}" for what, count, whole in shown)
        print_main(line)
        progress.save_checkpoint()
        if epoch < epochs and self._stop_requested():
            raise Stopped

    def describe(self, dtype, loading_seconds):
        """Return what run.json says of the run and its machine."""
        history = self.progress.finish()
        seconds = {"loading": loading_seconds, "training": history.pop("seconds")}
        trainable, all_parameters = self.model.get_nb_trainable_parameters()
        training, validation = len(self.data.training), len(self.data.validation)
        return {
            "rows": {"all": training + validation, "training": training, "validation": validation},
            "compute_dtype": str(dtype).removeprefix("torch."),
            "processes": self.state.num_processes,
            "device": devices.device_name(self.state.device),
            "versions": libraries.library_versions(),
            "trainable_parameters": trainable,
            "all_parameters": all_parameters,
            **history,
            "validation_calls": self.evaluator.calls if self.evaluator else None,
            "seconds": seconds,
            "peak_memory_gib": devices.peak_memory(self.state.device),
        }

    def _stop_requested(self):
        return any_stop_requested(self.stop_request, self.state)
