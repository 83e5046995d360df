"""The training loop: pretraining and fine-tuning differ in their rows and first weights, not here.

What is notable: the order of the data is a function of (seed, epoch), so a run resumes from a step
number alone; the loss is a sum over the whole batch divided by its number of targets, so that any
number of processes computes the same thing; nothing in a step waits for a GPU.
"""

import math
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from dataset.catalog import shown
from model import YuanMengModel
from model.loading import read_checkpoint
from training.attention import BLOCK_CAUSAL, FLEX, SDPA
from training.checkpoint import (
    RESUME_FORMAT,
    Saver,
    changes,
    keep_previous,
    model_weights,
    read_resume_state,
)
from training.distributed import World
from training.evaluation import bits_per_byte, nats_per_token, token_byte_lengths
from training.hardware import can_compile, compile_layers, flops_per_token, peak_flops
from training.loss import chunked_cross_entropy, softmax_gradient
from training.optimizer import MasterOptimizer, Recipe
from training.order import MixedOrder, order_of
from training.reporting import Reporter
from training.schedule import WARMUP_STEPS, reference_cosine, trapezoid
from training.settings import TrainSettings

FEW_ROWS = 32  # so many of one's own are asked now and then whether they are learnt
OWN_EVERY = 10  # steps between two times
LEARNT_NATS = 0.01  # a token: less is known by heart


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the batch's records."""


class Trainer:
    """One run of one stage.

    Args:
        settings: with `preset`, `batch_size` and the other defaults filled in (`training.stage`).
        stage: `pretrain` or `sft`; names the files written.
        recipe: how weights are updated.
        model: with its first weights, on its device, in its training dtype.
        rows: the packed rows (`dataset.rows.PackedRows`).
        tokenizer: for bits per byte.
        world: this process among the others.
    """

    def __init__(
        self,
        settings: TrainSettings,
        stage: str,
        recipe: Recipe,
        model: YuanMengModel,
        rows,
        tokenizer,
        world: World,
    ):
        self.settings, self.stage, self.recipe, self.world = settings, stage, recipe, world
        self.model, self.rows = model, rows
        self.device = next(model.parameters()).device
        self.byte_lengths = token_byte_lengths(tokenizer)
        self.optimizer = MasterOptimizer(model, recipe)
        self.saver = Saver()
        out_dir = Path(settings.out_dir)
        self.reporter = Reporter(stage, out_dir, settings, world.is_main)
        self.weights_path = out_dir / f"{stage}_{model.config.hidden_size}.pth"
        self.resume_path = self.weights_path.with_suffix(".resume.pth")

        self.order = order_of(
            rows, getattr(settings, "mix", 0), settings.batch_size, settings.seed
        )
        self.batch_size = self.order.batch_size
        self.own_rows: list[int] = []  # of the user's file, if they are few
        if isinstance(self.order, MixedOrder):
            self.own_rows = self.order.own.tolist()
        elif settings.data and getattr(settings, "mix", None) is not None:
            self.own_rows = list(range(len(rows.train)))
        if len(self.own_rows) > FEW_ROWS:
            self.own_rows = []
        if self.batch_size % world.size:
            raise ValueError(
                f"a batch of {self.batch_size} rows does not divide among {world.size} processes; "
                f"set --batch_size to a multiple of {world.size}"
            )
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = self.steps_per_epoch * settings.epochs
        if settings.max_steps is not None:
            self.total_steps = min(self.total_steps, settings.max_steps)
        self.warmup_steps = settings.warmup_steps
        if self.warmup_steps is None:
            self.warmup_steps = min(WARMUP_STEPS, self.total_steps // 10)
        self.step = 0  # steps done
        self.last_eval = 0  # step of the last held-out loss
        self.elapsed = 0.0  # seconds trained, all sessions together
        self.resumed = self.stopped = False
        self.may_end_early = False  # set by the stage where nobody named the run's length
        self.ends_at: int | None = None  # the step of an early end, once it is decided
        # (step, loss, gradient norm) since the last log line; on a GPU they are not read before it
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        on_gpu = self.device.type == "cuda"
        self.log_every = settings.log_every or (100 if on_gpu else 10)
        self.check_every = self.log_every if on_gpu else 1
        # On a CPU the activations of a few rows stay in the processor's caches; a GPU wants many.
        rows_here = self.batch_size // world.size
        most = min(rows_here, settings.part_rows or (rows_here if on_gpu else 4))
        self.part_rows = next(n for n in range(most, 0, -1) if rows_here % n == 0)
        # Few tokens at a time keep a CPU's logits small; a GPU wants few launches.
        self.loss_chunk = 16384 if on_gpu else 1024
        self.kernel = self.eager_kernel = SDPA if on_gpu else BLOCK_CAUSAL

    # -- the story -----------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end or a stop request; then weights, resume state and curves are on disk.

        Raises:
            NonFiniteLoss, checkpoint.SaveError
        """
        session_start, elapsed_before = time.perf_counter(), self.elapsed
        random_state = torch.get_rng_state()
        self.prepare_speed()
        torch.set_rng_state(random_state)  # measuring the machine drew some numbers
        self.meter = Meter()
        self._set_next_eval()
        with stop_requests() as stop:
            while self.step < self.total_steps:
                batch = self.batch(self.step)
                elapsed = elapsed_before + time.perf_counter() - session_start
                targets, tokens = self._agree(batch, elapsed, stop)
                if self.stopped or self._progress() >= 1:
                    break
                loss, norm = self.learn(batch, targets)
                self.pending.append((self.step, loss, norm))
                self.meter.tokens += tokens
                self.step += 1
                self._after_step()
            # Still inside: a Ctrl-C now must not cost the steps since the last save.
            self._log()
            if not self.stopped:
                self._check_own_records()
                self._evaluate(self.settings.final_eval_rows)
            self.save(wait=True, finished=not self.stopped)
        self.reporter.draw()
        self.reporter.close()
        if self.stopped:
            self.reporter.say(
                f"Stopped at step {self.step}; everything is saved. Continue with --resume."
            )
        else:
            self.reporter.say(
                f"Done: {self.step} steps in {self.elapsed / 60:.1f} min; "
                f"weights in {self.weights_path}"
            )

    def _after_step(self) -> None:
        """What is due between two steps: checks, a log line, a save, a held-out loss."""
        if self.step % self.check_every == 0:
            self._check()
        if (self.step - 1) % self.log_every == 0:
            self._log()
        self.reporter.show_progress(self.step, self._expected_steps())
        self.saver.check()
        if self.may_end_early and self.step % OWN_EVERY == 0:
            with self.meter.pause():
                self._end_early()
        if self._eval_is_due():
            with self.meter.pause():
                self._evaluate(self.settings.eval_rows)
            self.next_eval += self._eval_interval()
        if self.step % self.settings.save_every == 0:
            self.save(wait=False)

    def _set_next_eval(self) -> None:
        """The same places in a run that was interrupted and in one that was not."""
        interval = self._eval_interval()
        self.next_eval = interval * (self._eval_position() // interval + 1)

    def _eval_is_due(self) -> bool:
        """Whether it is time for a held-out loss on the way; the one at the end comes anyway.

        Unless the user set an interval, enough training lies between two of them for them to take
        about a twentieth of the time.
        """
        if self.step == self.total_steps or self._eval_position() < self.next_eval:
            return False
        steps_between = 10 * self.settings.eval_rows / self.batch_size
        return bool(self.settings.eval_every) or self.step - self.last_eval >= steps_between

    # -- one step ------------------------------------------------------------------------------

    def _indices(self, step: int) -> list[int]:
        """Rows of the whole batch of a step; they depend on the seed and the step only."""
        return self.order.indices(step)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This process's share of a step's batch: tokens, targets and segments, each [B, T]."""
        indices = self._indices(step)[self.world.rank :: self.world.size]
        return self.rows.train.batch(indices)

    def _to_device(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The batch where the network is; to a GPU it travels while the GPU still computes."""
        if self.device.type == "cuda":
            return tuple(x.pin_memory().to(self.device, non_blocking=True) for x in batch)
        return batch

    def _agree(self, batch, elapsed: float, stop: dict) -> tuple[float, float]:
        """Share with all processes what must be the same in each: whether to stop, and the time.

        Returns the numbers of targets and of real tokens in the whole batch.
        """
        _, y, segments = batch
        targets, tokens, wants_stop, self.elapsed = self.world.sum_numbers(
            int((y >= 0).sum()),
            int((segments > 0).sum()),
            stop["asked"],
            elapsed if self.world.is_main else 0.0,
        )
        self.stopped = wants_stop > 0
        return targets, tokens

    def learn(self, batch, targets: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One step on this process's share of a batch: its gradients, and the update if it is due.

        `targets` is their number in the whole batch. Returns this share's loss, and the gradient's
        norm if the weights were updated.
        """
        return self._forward_backward(*self._to_device(batch), targets), self._update()

    def _forward_backward(self, x_BT, y_BT, segments_BT, targets: float) -> torch.Tensor:
        """Add a batch's gradients, part by part; return its loss, this process's share of it."""
        positions = torch.arange(x_BT.shape[1], device=x_BT.device)[None]
        scale = 1.0 / max(1.0, targets)
        total = torch.zeros((), device=x_BT.device)
        parts = (tensor.split(self.part_rows) for tensor in (x_BT, y_BT, segments_BT))
        for x, y, segments in zip(*parts, strict=True):
            mask = self.kernel.make_mask(segments)
            h_BTD = self.model.hidden_states(self.model.tok_embeddings(x), positions, mask)
            loss = chunked_cross_entropy(
                h_BTD.flatten(0, 1),
                self.model.tok_embeddings.weight,
                y.flatten(),
                scale,
                self.softmax_gradient,
                self.loss_chunk,
            )
            (loss / self.settings.accumulation_steps).backward()
            self.optimizer.collect_gradients()
            total += loss.detach()
        return total

    def _update(self) -> torch.Tensor | None:
        """Update the weights if the accumulation is full; returns the gradient norm then."""
        if (self.step + 1) % self.settings.accumulation_steps:
            return None
        self.world.sum_(self.optimizer.gradients_flat)
        return self.optimizer.step(self._rate(self.step, self._progress()))

    def _rate(self, step: int, progress: float) -> float:
        """The learning rate of a step as a factor of its peak."""
        if self.settings.recipe == "reference":
            return reference_cosine(progress)
        return trapezoid(progress, step, self.warmup_steps, self.settings.decay_share)

    def _progress(self) -> float:
        """How much of the run is over, by steps or by the clock, whichever is further."""
        by_steps = self.step / self.total_steps
        if self.settings.max_minutes is None:
            return by_steps
        return max(by_steps, self.elapsed / 60 / self.settings.max_minutes)

    def _expected_steps(self) -> int:
        """The length of the run in steps; an estimate if the clock ends it."""
        progress = self._progress()
        return (
            max(self.step, min(self.total_steps, round(self.step / progress)))
            if progress
            else self.total_steps
        )

    # -- around the steps ----------------------------------------------------------------------

    def prepare_speed(self) -> None:
        """Measure the machine's ceiling; compile if the run is long enough to pay for it."""
        dtype = next(self.model.parameters()).dtype
        peak = peak_flops(self.device, dtype) * self.world.size
        self.flops_share = flops_per_token(self.model, self.settings.row_length) / peak
        settings = self.settings
        long_enough = self.total_steps >= 200 and (settings.max_minutes or math.inf) >= 3
        wanted = settings.compile == "yes" or (settings.compile == "auto" and long_enough)
        if wanted and not can_compile(self.device):
            self.reporter.say("No C++ compiler found: training without torch.compile, slower.")
            wanted = False
        self._use_compiled(wanted)
        if wanted:
            gradients = self.optimizer.gradients_flat.clone()  # of a resumed accumulation
            try:
                self._forward_backward(*self._to_device(self.batch(self.step)), targets=1)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.reporter.say(
                    f"torch.compile failed ({type(error).__name__}): training without it."
                )
                self._use_compiled(False)
            self.optimizer.gradients_flat.copy_(gradients)  # a rehearsal: nothing is learnt from it

    def _use_compiled(self, wanted: bool) -> None:
        on_gpu = self.device.type == "cuda"
        self.kernel = FLEX if wanted and on_gpu else self.eager_kernel
        for layer in self.model.layers:
            layer.attention.attend = self.kernel.attend
        compile_layers(self.model, wanted)
        self.softmax_gradient = softmax_gradient
        if wanted:
            self.softmax_gradient = torch.compile(softmax_gradient, dynamic=False)

    def _eval_interval(self) -> float:
        return self.settings.eval_every or 0.1

    def _eval_position(self) -> float:
        """Where the run stands, in the unit of `_eval_interval`: steps, or a share of the run."""
        return self.step if self.settings.eval_every else self._progress()

    def _check(self) -> None:
        """Raise if a step since the last check had a gradient that is not finite.

        The optimizer drops such a gradient by itself, so the weights are still good here.
        """
        for step, _, norm in self.pending[-self.check_every :]:
            if norm is not None and not math.isfinite(float(norm)):
                self.saver.wait()
                raise NonFiniteLoss(self._describe_batch(step))

    def _describe_batch(self, step: int) -> str:
        first = step - self.settings.accumulation_steps + 1
        indices = [i for s in range(first, step + 1) for i in self._indices(s)]
        records = [self.rows.train.records[i] for i in indices]
        kept = (
            f"the last good weights are in {self.weights_path}"
            if self.weights_path.exists()
            else ("no weights were saved yet")
        )
        return (
            f"the loss is not finite at step {step}; its batch holds the records around "
            f"{self.rows.where(records)}; {kept}. "
            "Look at these records, or lower --learning_rate."
        )

    def _log(self) -> None:
        """The specification's line, then speed; every step's loss goes into the history."""
        if not self.pending:
            return
        self._check()
        points, self.pending = self._pending_losses(), []
        step, loss = points[-1]
        speed, seconds_per_step = self.meter.read(len(points))
        rate = self.recipe.learning_rate * self._rate(step, step / self._expected_steps())
        epoch, position = divmod(step, self.steps_per_epoch)
        epoch_steps = min(self.steps_per_epoch, self._expected_steps())
        remaining = seconds_per_step * max(0, epoch_steps - position - 1) / 60
        if self.world.is_main:
            for number, value in points:
                self.reporter.record("loss", number, value, lr=rate, tokens_per_second=speed)
        self.reporter.say(
            f"Epoch:[{epoch + 1}/{self.settings.epochs}]({position}/{epoch_steps}) "
            f"loss:{loss:.3f} lr:{rate:.12f} epoch_time:{remaining:.1f}min "
            f"tokens/s:{speed:.0f} mfu:{speed * self.flops_share:.1%}"
        )

    def _pending_losses(self) -> list[list]:
        """[step, loss] of each step since the last log line, all processes' shares added up."""
        if not self.pending:
            return []
        losses = self.world.sum_(torch.stack([loss.float() for _, loss, _ in self.pending]))
        return [[step, x] for (step, _, _), x in zip(self.pending, losses.tolist(), strict=True)]

    def _evaluate(self, max_rows: int) -> None:
        self.last_eval = self.step
        if not len(self.rows.heldout):
            return
        with torch.compiler.set_stance("force_eager"):  # another shape would compile again
            value = bits_per_byte(
                self.model,
                self.rows.heldout,
                self.eager_kernel,
                self.byte_lengths,
                self.world,
                max_rows,
            )
        if self.world.is_main:
            self.reporter.record("heldout", self.step, value)
        self.reporter.say(f"held-out loss at step {self.step}: {value:.4f} bits per byte")

    def _own_loss(self) -> float:
        """The loss on the user's records, if they are few; else infinite."""
        if not self.own_rows:
            return math.inf
        with torch.compiler.set_stance("force_eager"):
            return nats_per_token(
                self.model, self.rows.train, self.own_rows, self.eager_kernel, self.world
            )

    def _end_early(self) -> None:
        """End the run early if the user's few records are learnt before the rate begins to fall.

        The run does not break off: the rate falls to zero first, as it does in any run.
        """
        end = math.ceil(self.step / max(1e-9, 1 - self.settings.decay_share))
        if self.ends_at or end >= self.total_steps or (loss := self._own_loss()) >= LEARNT_NATS:
            return
        self.ends_at = self.total_steps = end
        self._set_next_eval()
        self.reporter.say(
            f"The loss on your {self.rows.meta['records']} records is {loss:.3f} at step "
            f"{self.step}: they are learnt by heart; stopping at step {end}, as the rate falls."
        )

    def _check_own_records(self) -> None:
        """At the end: say it if the user's few records are learnt by heart."""
        loss = self._own_loss()
        if loss < LEARNT_NATS and not self.ends_at:
            self.reporter.say(
                f"The loss on your {self.rows.meta['records']} records is {loss:.3f}: they are "
                "learnt by heart; more passes add nothing."
            )

    # -- saving and resuming -------------------------------------------------------------------

    def fingerprint(self) -> dict:
        """What must not change between a run and its continuation."""
        names = (
            "recipe",
            "learning_rate",
            "accumulation_steps",
            "row_length",
            "dtype",
            "seed",
            "warmup_steps",
            "decay_share",
        )
        settings = asdict(self.settings)
        if settings["warmup_steps"] is None:  # not this run's: a longer one may go on from it
            settings["warmup_steps"] = WARMUP_STEPS
        shape = {
            key: getattr(self.model.config, key)
            for key in ("hidden_size", "num_layers", "vocab_size")
        }
        return {
            **{name: settings[name] for name in names},
            **shape,
            "batch_size": self.batch_size,
            **({"mix": mix} if (mix := settings.get("mix")) else {}),
            **self.rows.sources,
            "data_path": str(shown(Path(self.rows.meta["data_path"]))),  # for the message only
        }

    def save(self, wait: bool, finished: bool = False) -> None:
        """Save weights and resume state; in the background unless `wait`."""
        self._check()
        if self.step % self.settings.accumulation_steps:
            # The main process takes over what all have gathered; only it writes and reads a state.
            self.world.sum_(self.optimizer.gradients_flat)
            if not self.world.is_main:
                self.optimizer.gradients_flat.zero_()
        pending = self._pending_losses()
        if self.world.is_main:
            if not self.resumed:
                self._keep_earlier_run()
                self.resumed = True
            state = {
                "format": RESUME_FORMAT,
                "stage": self.stage,
                "fingerprint": self.fingerprint(),
                "step": self.step,
                "elapsed": self.elapsed,
                "finished": finished,
                "ends_at": self.ends_at,
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "history": self.reporter.history_tensors(pending),
                "processes": self.world.size,
                "launchers": list(self.world.launchers),
            }
            self.saver.save({self.resume_path: state, self.weights_path: model_weights(self.model)})
            if wait:
                self.saver.wait()
        if wait:
            self.world.barrier()

    def _keep_earlier_run(self) -> None:
        """A new run writes over an earlier one's files; who forgot --resume can have them back."""
        kept = [keep_previous(path) for path in (self.resume_path, self.weights_path)]
        if any(kept):
            names = ", ".join(str(path) for path in kept if path)
            self.reporter.say(f"An earlier run's files are kept as {names}.")

    def _saved_at(self) -> float:
        """When the state on this node's disk was written, if this run is to go on from it; else 0.

        That is so with --resume, and if this very `torchrun` wrote it: then it has started the
        processes anew because one died, or a node came or went.
        """
        launcher = self.world.launcher
        if not self.world.is_first_on_node or not (self.settings.resume or launcher):
            return 0.0
        try:
            saved_at = self.resume_path.stat().st_mtime
            if self.settings.resume or launcher in read_checkpoint(self.resume_path)["launchers"]:
                return saved_at
        except (OSError, ValueError, KeyError):  # none, or an earlier run's
            pass
        return 0.0

    def _state_to_resume(self) -> dict | None:
        """The newest state, wherever it lies: which node is the first one, `torchrun` decides.

        Only one disk has to hold it; all processes get the same. None: begin at the beginning.

        Raises:
            ValueError: --resume, and there is no readable state.
        """
        world, path = self.world, self.resume_path
        times = world.gather(self._saved_at())
        source = times.index(max(times))
        if not times[source] and not self.settings.resume:
            return None
        state = None
        with world.together():
            if world.rank == source:
                state = read_resume_state(path, self.stage)
        content = world.file_of(source, path)
        return state or read_resume_state(path, self.stage, content)

    def resume(self) -> bool:
        """Go on from a resume state where there is one to go on from; false if that run had ended.

        Raises:
            ValueError: there is no readable state, or a setting that matters changed.
        """
        state = self._state_to_resume()
        if state is None:
            return True
        changed = changes(state["fingerprint"], self.fingerprint())
        if changed:
            raise ValueError(
                f"{self.resume_path}: cannot continue, because {'; '.join(changed)}. "
                "Set it back, or start anew without --resume."
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(f"{self.resume_path}: {error}") from error
        if not self.world.is_main:
            self.optimizer.gradients_flat.zero_()
        torch.set_rng_state(state["random"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.reporter.load_history(state["history"])
        if ends_at := state.get("ends_at"):
            self.ends_at = self.total_steps = min(ends_at, self.total_steps)
        self.resumed = True
        size, saved_by = self.world.size, state.get("processes", self.world.size)
        again = self.world.launcher and self.world.launcher in state.get("launchers", ())
        self.reporter.say(
            f"Resuming {self.resume_path} at step {self.step}"
            + (f", with {size} processes instead of {saved_by}" if size != saved_by else "")
            + (": torchrun has started the processes again." if again else ".")
        )
        return not (state["finished"] and self._progress() >= 1)

    def write_results(self) -> None:
        """Write the weights and the curve of the run resumed.

        A kill between the last save's two files leaves a finished state beside older weights, and
        one right after it leaves no curve.
        """
        if self.world.is_main:
            self.saver.save({self.weights_path: model_weights(self.model)})
            self.saver.wait()
        self.reporter.draw()
        self.reporter.close()


class Meter:
    """Tokens and seconds since it was last read, pauses left out."""

    def __init__(self):
        self.tokens, self.start = 0.0, time.perf_counter()

    @contextmanager
    def pause(self):
        paused = time.perf_counter()
        yield
        self.start += time.perf_counter() - paused

    def read(self, steps: int) -> tuple[float, float]:
        """(tokens per second, seconds per step) since the last reading."""
        seconds = time.perf_counter() - self.start
        speed = self.tokens / seconds
        self.__init__()
        return speed, seconds / steps


@contextmanager
def stop_requests():
    """Turn Ctrl-C and SIGTERM into a request read between steps; a second Ctrl-C interrupts."""
    request = {"asked": 0}

    def ask(signum, frame):
        if request["asked"] and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request["asked"] = 1

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
