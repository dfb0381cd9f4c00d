"""Training: patches in, a run folder out. Dice + cross-entropy, AdamW, cosine schedule (paper section 3.2 and App. B), on Lightning Fabric.

A training can be ended at any moment, by any signal or a power cut, and goes on from its last checkpoint as if nothing had happened: on a CPU
bit for bit. Under `ddp` and `fsdp` every process runs this file; the first one writes.
"""

import contextlib
import errno
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..errors import UserError
from .begin import OnValidation, check, claimed, computed_by, launched
from .checkpoint import build_network, load_newest, save_checkpoint, save_state
from .deep import DeeplySupervised, core
from .estimate import needed_gib
from .feed import Batch, Feed
from .folder import Run, State, written_whole
from .guard import Guard, is_out_of_memory, lost_a_loader, not_finite, out_of_memory, too_many_loaders
from .initialise import start_from, summary
from .log import History, Progress, TensorBoard, memory_gib
from .mixture import label_space, source_of
from .optimise import Averaged, build_optimizer, encoder_parameters, set_learning_rate
from .resume import all_finite, as_rows, as_table, check_identity, gather, identity, random_states, scatter, set_random_states
from .signals import Stopped, StopRequest
from .step import class_weights, train_step
from .validate import chosen, class_mean_dice, validate

HEARTBEAT_SECONDS = 5  # how often status.json tells the steps done, and history.csv the rows
FULL = (errno.ENOSPC, errno.EDQUOT)


def fit(
    settings: Settings,
    cases: Sequence[PreparedCase],
    folder: str | Path,
    *,
    validation: Sequence[PreparedCase] = (),
    progress: bool = True,
    on_validation: OnValidation | None = None,
) -> Run:
    """Train a network, or go on with the training that the folder holds.

    Args:
        settings: of the run; kept in the folder. A folder with other settings is refused, but for those that only say how it is computed (`begin.MEANS`).
        cases: prepared, labelled.
        folder: `runs/<name>`; for several nodes, one that all of them see.
        validation: cases whose class-mean Dice chooses the best weights, and may end the training early; `training.validation_cases_most` of them.
        progress: a bar on a terminal, and a line each validation.
        on_validation: called as f(step, network) every `validate_every` steps and at the end, in the first process; what it returns (name -> number)
            joins the history.

    Returns:
        The run: `history.csv`, `last.ckpt`, `best.safetensors` (by validation Dice; without validation cases the last weights).

    Raises:
        UserError: the folder belongs to another run, or another training is at work there; a checkpoint of other data; classes that are not the
            data's; steps that stay not finite; no memory.
        Stopped: SIGTERM or SIGUSR1 came; the checkpoint is written, and the same call goes on.
    """
    run = Run(folder)
    check(settings, validation, on_validation)
    fabric = launched(settings.training)
    with claimed(run, settings) if fabric.is_global_zero else contextlib.nullcontext():
        fabric.barrier()
        try:
            with StopRequest() as stop:
                training = _Training(fabric, settings, cases, validation, run, stop=stop, progress=progress, on_validation=on_validation)
                training.go()
            fabric.barrier()  # the folder is complete for all
        except BaseException as error:
            error = _told(error, settings, run, fabric.device)
            if fabric.is_global_zero:
                with contextlib.suppress(OSError):  # a full disk; the error itself tells
                    run.set_state("stopped" if isinstance(error, Stopped) else "failed", error=f"{type(error).__name__}: {error}")
            raise error
    return run


def _told(error: BaseException, settings: Settings, run: Run, device: torch.device) -> BaseException:
    """What a user can mend as one line; all else as it is."""
    if settings.training.workers and lost_a_loader(error):
        return too_many_loaders(settings)
    if is_out_of_memory(error):
        there = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
        return out_of_memory(settings, needed_gib(settings), there)
    if isinstance(error, OSError) and error.errno in FULL:
        return UserError(f"{run.folder}: no room on the disk; the last checkpoint is as it was. Make room; the same command goes on from there.")
    return error


class _Training:
    """The parts of a training in one process, and what moves them: `go`."""

    def __init__(
        self,
        fabric: Fabric,
        settings: Settings,
        cases: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        run: Run,
        *,
        stop: StopRequest,
        progress: bool,
        on_validation: OnValidation | None,
    ):
        config = settings.training
        self.fabric, self.settings, self.config, self.run, self.stop, self.on_validation = fabric, settings, config, run, stop, on_validation
        self.validation, self.sharded, self.first = chosen(validation, config.validation_cases_most), config.strategy == "fsdp", fabric.is_global_zero
        self.identity = identity(settings, cases, self.validation)
        fabric.seed_everything(config.seed, verbose=False)
        network = build_network(settings)
        kept = load_newest(run.checkpoint_file, run.previous_file, say=lambda text: print(f"{run.name}: {text}"))
        told = self._start(network) if kept is None else check_identity(run.checkpoint_file, kept["identity"], self.identity)

        network = DeeplySupervised(network) if config.deep_supervision else network
        self.network = fabric.setup_module(network)
        self.optimizer: Any = fabric.setup_optimizers(build_optimizer(self.network, config))
        self.frozen = encoder_parameters(self.network)
        self.average = Averaged(core(network), config.ema) if config.ema is not None else None
        weights = class_weights(cases, settings.model.out_channels, config.class_balance)
        self.class_weights = fabric.to_device(weights) if weights is not None else None
        self.feed = Feed(source_of(cases, settings), config, rank=fabric.global_rank, world=fabric.world_size)

        self.guard = Guard(config.non_finite_steps)
        self.history = History(run.history_file if self.first else None)
        self.step, self.validated, self.best_step, self.over = 0, 0, 0, False
        self.best: float | None = None
        if kept is not None:
            self._restore(kept)
        self.progress = Progress(run.name, done=self.step, steps=config.steps, show=progress and self.first)
        if told:
            self.progress.say(told)
        if len(self.validation) < len(validation):
            self.progress.say(f"validated on {len(self.validation)} of {len(validation)} cases (training.validation_cases_most)")
        self.told_at, self.line_from = time.monotonic(), self.validated
        self.steps_gib: float | None = None  # most memory until the first validation, whose hooks are not every network's
        self.board: TensorBoard | None = None
        self.began = time.perf_counter() - (self.history.rows[-1]["seconds"] if self.history.rows else 0.0)

    def go(self) -> None:
        """From where it is to the last step, or to where patience or a signal ends it. A training that is done is left as it is."""
        if (self.over or self.step == self.config.steps) and "steps_gib" in self.run.status:  # told at the end; a driver of notebooks has its own word of state
            return
        self.progress.say(computed_by(self.settings, self.fabric.device))
        self._tell("running", steps=self.step)
        if self.first and "tensorboard" in self.config.loggers:
            self.board = TensorBoard(self.run.folder, begin=self.line_from)
        if self.step == 0 and not self._keep():  # something to go back to; and a folder that cannot be written is known at once
            raise UserError(f"training.init_from: {self.config.init_from}: found weights that are not finite, expected numbers. Choose others.")
        if self._due(self.step) and self.validated < self.step:
            self._validate()
            self._pause(keep=True)
        while self.step < self.config.steps and not self.over:
            for step, batches in self._batches():
                self._take(step, batches)
                if self.guard.gives_in:
                    limit, loss = self.config.non_finite_steps, self.history.rows[-1]["loss"]
                    self._roll_back(batches, f"loss: found {loss} in {limit} steps in a row up to step {self.step}")
                    break
                if (self._due(self.step) or self._keeps()) and not self._sound():
                    self._roll_back(batches, f"weights: found infinite ones after step {self.step}, whose loss and gradient were finite")
                    break
                if self._due(self.step):
                    self.steps_gib = self.steps_gib or memory_gib()
                    self._validate()
                self._pause(keep=self._keeps())
                self._heartbeat()
                if self.over:
                    break
        self.progress.close()
        if self.board:
            self.board.close()
        took = {"seconds": round(self.history.rows[-1]["seconds"], 1), "peak_gib": memory_gib(), "steps_gib": self.steps_gib}
        self._tell("done", steps=self.step, **took, skipped=self.guard.skipped, best=self.best)

    def _pause(self, *, keep: bool) -> None:
        """Between two steps: a checkpoint where it is due, and an end where one was asked for."""
        stopping = self._stopping()
        kept = self._keep() if stopping or keep else False
        if stopping:
            raise self._stopped(kept)

    def _stopped(self, kept: bool) -> Stopped:
        how = "written" if kept else "as it was, for the weights are infinite by now"
        return Stopped(f"asked to stop after step {self.step}; {self.run.checkpoint_file} is {how}, the same command goes on from there")

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        """The steps that are left, with their batches. A signal that goes to all processes of a job ends those that make patches too: then what is
        done is kept at once, without a word to other devices, which wait in a step. Under FSDP it takes all of them, and the last checkpoint stands.
        """
        try:
            yield from self.feed.steps(self.step, self.config.steps)
        except RuntimeError:
            if not self.stop.asked or self.sharded:
                raise
            raise self._stopped(self._keep(alone=True)) from None

    def _take(self, step: int, batches: list[Batch]) -> None:
        config = self.config
        rate = set_learning_rate(self.optimizer, step, config, lowered=self.guard.rate)
        frozen = self.frozen if step < config.frozen_steps else ()
        loss, norm, taken = train_step(self.fabric, self.network, self.optimizer, batches, config, self.class_weights, guard=self.guard, frozen=frozen)
        if not taken:
            self.progress.say(f"step {step + 1}: loss {loss}, gradient norm {norm}; the step is skipped, {self.guard.in_a_row} in a row")
        elif self.average is not None:
            self.average.update(core(self.network.module))
        self.step = step + 1
        row = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm, "seconds": time.perf_counter() - self.began}
        self.history.add(row)
        self.progress.step()

    # ------------------------------------------------------------ validation

    def _due(self, step: int) -> bool:
        return step > 0 and (step == self.config.steps or step % self.config.validate_every == 0)

    def _validate(self) -> None:
        """Dice, and with it the best weights; or not, where the training is asked to stop meanwhile: it is done when that goes on."""
        network = self.network if self.sharded else core(self.network.module)
        with self._averaged(network):
            values = self.on_validation(self.step, network) if self.on_validation and self.first else {}
            if self.validation:
                table = self._measured(network)
                if table is None:
                    self.network.train()
                    return
                values |= {"validation_dice": self.fabric.broadcast(class_mean_dice(table))}  # all processes decide by the same number
                self._best(values["validation_dice"], table)
        self.network.train()
        self.validated = self.step
        self.history.rows[-1] |= {name: float(value) for name, value in values.items()}  # plain floats: a checkpoint holds no numpy
        if self.board:
            self.board.add(self.history.rows[self.line_from :])
        if self.step > self.line_from:
            self.progress.line(self.history.rows[self.line_from :], skipped=self.guard.skipped, memory_gib=memory_gib(), best=self.best)
        self.line_from = self.step

    def _measured(self, network: nn.Module) -> pd.DataFrame | None:
        """Each process measures its share of the cases; under FSDP all of them all, for they compute together."""
        world, rank = (1, 0) if self.sharded else (self.fabric.world_size, self.fabric.global_rank)
        stop = (lambda: False) if self.sharded else lambda: self.stop.asked
        table = validate(network, self.validation[rank::world], self.settings, stop=stop, progress=self.progress.show)
        if world > 1:
            tables: list = [None] * world
            torch.distributed.all_gather_object(tables, table)
            table = None if any(part is None for part in tables) else pd.concat(tables, ignore_index=True)
        return table

    def _best(self, dice: float, table: pd.DataFrame) -> None:
        if self.best is None or dice > self.best:
            self.best, self.best_step = dice, self.step
            weights, _ = self._gathered()
            if self.first:
                save_state(weights, self.run.weights_file, self.settings)
                with written_whole(self.run.validation_file) as part:
                    table.assign(step=self.step).to_csv(part, index=False)
        since = (self.step - self.best_step) // self.config.validate_every
        if self.config.patience is not None and since >= self.config.patience:
            self.over = True
            self.progress.say(f"no better Dice in {since} validations; the training ends at step {self.step}, the best is of step {self.best_step}")

    @contextlib.contextmanager
    def _averaged(self, network: nn.Module) -> Iterator[None]:
        """The averaged weights in place of the network's own, where there are any."""
        if self.average is not None:
            self.average.swap(network)
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap(network)

    # ------------------------------------------------------------ checkpoints

    def _keeps(self) -> bool:
        """A checkpoint is due. None is made while steps fail, so that there is a good one to go back to."""
        ended = self.over or self.step == self.config.steps
        return ended or (self.step % (self.config.checkpoint_every or self.config.validate_every) == 0 and not self.guard.in_a_row)

    def _sound(self, *, alone: bool = False) -> bool:
        """Whether all weights are finite, on all devices. A step whose loss and gradient are finite may still go too far."""
        finite = all_finite(self.network)
        if self.sharded and not alone:
            finite = bool(self.fabric.all_reduce(torch.tensor(float(finite), device=self.fabric.device), reduce_op="sum") == self.fabric.world_size)
        return finite

    def _keep(self, *, alone: bool = False) -> bool:
        """Write a checkpoint, unless weights are not finite; whether it was. It comes last: a run that is killed before it goes on from the one
        before, and writes the rest again. `alone`: without a word to other devices, whose random numbers are then not in it.
        """
        if not self._sound(alone=alone):
            return False
        random: list = [random_states()]
        if self.fabric.world_size > 1 and not alone:
            random *= self.fabric.world_size
            torch.distributed.all_gather_object(random, random[0])
        self.guard.kept(self.step)
        weights, state = self._gathered(whole=True)
        if not self.validation:  # nothing to choose by: the last are the best
            with self._averaged(core(self.network.module)) if self.average is not None else contextlib.nullcontext():
                best, _ = self._gathered()
                if self.first:
                    save_state(best, self.run.weights_file, self.settings)
        if not self.first:
            return True
        self.history.flush()
        state = {
            "identity": self.identity,
            "settings": self.settings.model_dump(mode="json"),
            "step": self.step,  # the schedule's and the sampler's place too; the precisions that there are have no scaler
            "network": weights,
            "optimizer": state,
            "average": self.average.state_dict() if self.average is not None else None,
            "random": random,  # of each process
            "guard": self.guard.state(),
            "validation": {"step": self.validated, "best": self.best, "best_step": self.best_step, "over": self.over},
            "history": as_table(self.history.rows),
        }
        save_checkpoint(self.run.checkpoint_file, state, previous=self.run.previous_file)
        return True

    def _gathered(self, *, whole: bool = False) -> tuple[dict[str, Tensor], dict]:
        """The network's weights, and with `whole` all that is trained with it, and the optimiser's state."""
        if self.sharded:
            return gather(self.network._forward_module, self.optimizer.optimizer, sharded=True)  # the root of FSDP; Fabric's `module` is inside it
        module = self.network.module
        return gather(module if whole else core(module), self.optimizer.optimizer, sharded=False)

    def _restore(self, state: dict) -> None:
        network = self.network._forward_module if self.sharded else self.network.module
        scatter(network, self.optimizer.optimizer, state["network"], state["optimizer"], sharded=self.sharded)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        set_random_states(state["random"], self.fabric.global_rank)
        self.guard.load(state["guard"])
        self.step, self.history.rows = state["step"], as_rows(state["history"])
        self.history.cut(self.step)
        told = state["validation"]
        self.validated, self.best, self.best_step, self.over = told["step"], told["best"], told["best_step"], told["over"]

    def _roll_back(self, batches: list[Batch], found: str) -> None:
        """Back to the last checkpoint with a lower rate; the second time at one place, the end. found: why."""
        guard = self.guard
        if not guard.roll_back(self.step):
            self.history.flush()
            raise not_finite(core(self.network.module), self.fabric.to_device(batches[0][0]), found)
        self.fabric.barrier()
        now, best = guard.state(), (self.best, self.best_step)
        state = load_newest(self.run.checkpoint_file, self.run.previous_file, say=self.progress.say)
        if state is None:
            raise UserError(f"{self.run.checkpoint_file}: is gone, expected the checkpoint of this training. Start it again.")
        self._restore(state)
        guard.load(now)
        self.best, self.best_step = best  # those in best.safetensors, which may be of a step after the checkpoint
        self.line_from = self.validated
        if self.board:
            self.board.begin(self.line_from)
        self.progress.back(self.step)
        self.progress.say(f"{found}: back to step {self.step}, with {guard.rate:g} of the learning rate")

    def _start(self, network: nn.Module) -> str | None:
        """Weights to start from, where they are asked for, and their table in the run folder."""
        if self.config.init_from is None:
            return None
        table = start_from(network, self.config.init_from, label_space(self.settings.data).class_names, head=self.config.init_head)
        if self.first:
            with written_whole(self.run.initial_file) as part:
                table.to_csv(part, index=False)
        return f"starts from {self.config.init_from}: {summary(table)}; {self.run.initial_file.name} tells each"

    # ------------------------------------------------------------ telling

    def _stopping(self) -> bool:
        """Whether any process was asked to stop."""
        if self.fabric.world_size == 1:
            return self.stop.asked
        asked: Any = self.fabric.all_reduce(torch.tensor(float(self.stop.asked), device=self.fabric.device), reduce_op="sum")
        return bool(asked > 0)

    def _heartbeat(self) -> None:
        if time.monotonic() - self.told_at > HEARTBEAT_SECONDS:
            self._tell("running", steps=self.step, skipped=self.guard.skipped, peak_gib=memory_gib())
            self.history.flush()
            self.told_at = time.monotonic()

    def _tell(self, state: State, **told: object) -> None:
        if self.first:
            self.run.set_state(state, **told)
