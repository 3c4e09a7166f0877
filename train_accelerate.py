"""Train Clip-Phi: accelerate launch train_accelerate.py --stage 1 (or 2). See --stage 1 --help and README.md.

Read it from top to bottom: parse, import, build, loop."""
# ruff: noqa: E402

import os
import sys

if sys.platform == "linux":  # read when torch is imported: less fragmentation of a GPU's memory
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from clip_phi.data.report import plain
from clip_phi.training.arguments import TrainingArguments, parse_arguments


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn an error of the input or the machine into one line and status 2, unless --debug asks for the traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # so that the launcher's last lines name this process and error
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        if debug:
            raise
        print(plain(f"train_accelerate.py: error: {error}"), file=sys.stderr)
        sys.exit(2)


# Parse. Nothing heavy is imported before, so that --help and a wrong option answer at once.
if __name__ == "__main__":
    arguments = parse_arguments()
    with one_line_errors(arguments.debug):
        arguments.check()

# Import.
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers.utils import logging

from clip_phi.batching.dataset import ImageReader, add_image_features
from clip_phi.batching.packing import PackedBatch
from clip_phi.environment import describe_environment, peak_flops
from clip_phi.hub.push import check_push, push
from clip_phi.training import guards
from clip_phi.training.checkpoint import EXIT_STOPPED, Checkpoints, EarlyStopping, StopSignal, describe_run, saved_run
from clip_phi.training.data import read_data
from clip_phi.training.device import check_machine, choose_precision, stop_with_launcher
from clip_phi.training.evaluate import Evaluator
from clip_phi.training.fsdp import check_fsdp_config, full_state_dict, gather, prepare, process_group_kwargs
from clip_phi.training.logger import FlopsPerToken, StepCounts, TrainingLogger
from clip_phi.training.memory import fit_batches, fit_longest
from clip_phi.training.model import describe_batches, load_model, load_processor, open_cache, resolve
from clip_phi.training.optim import make_optimizer, make_scheduler


# Build.
class Run:
    """Everything that the loop needs, in the state of the training checkpoint if the run is resumed.

    plain_model: the model without Accelerate's wrapper. record: the content of run.json."""

    def __init__(self, arguments: TrainingArguments):
        began = time.strftime(guards.TIME_FORMAT)
        logging.disable_progress_bar()  # one bar is enough
        self.output_dir = output_dir = Path(arguments.output_dir)
        guards.check_room(output_dir)
        stop_with_launcher()
        precision, reason = choose_precision(arguments, Path(__file__).resolve().parent)
        log: dict[str, Any] = {"log_with": arguments.report_to or None, "project_dir": str(output_dir)}
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=process_group_kwargs(), **log)
        self.accelerator = accelerator
        accelerator.print(reason)
        check_machine(arguments, accelerator)
        check_fsdp_config(accelerator, arguments)
        self.lock = guards.lock_run(output_dir) if accelerator.is_main_process else None
        device, world_size, is_main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
        set_seed(arguments.seed)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")

        self.processor = load_processor(arguments)
        model = load_model(arguments, accelerator)
        arguments = resolve(arguments, accelerator, model)
        before = saved_run(output_dir, arguments.resume_from_checkpoint)
        arguments, fits = fit_batches(arguments, model, accelerator, before)
        self.arguments = arguments
        accelerator.print(describe_batches(arguments, accelerator))
        if arguments.push_to_hub and is_main:  # better now than after a night of training
            check_push(arguments.push_to_hub, model.config.to_dict(), arguments.merged, output_dir)
        self.cache = open_cache(arguments, model, self.processor)
        read = ImageReader(self.processor, arguments.image_processing, self.cache)
        with accelerator.local_main_process_first():  # which writes the index that the others find
            self.data = data = read_data(arguments, self.processor, read, accelerator)
        fit_longest(model, arguments, data.longest, fits, accelerator.print)
        self.evaluator = Evaluator(arguments, data.held_out, read, self.processor, accelerator)
        trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
        accelerator.print(f"training {trainable:,} of {total:,} parameters on {world_size} x {device.type}")
        guards.check_room(output_dir, guards.room_needed(arguments, trainable, total, model.dtype.itemsize))

        optimizer = make_optimizer(model, arguments, device)
        self.scheduler = make_scheduler(optimizer, arguments, data.num_steps)
        self.model, self.optimizer = prepare(accelerator, model, optimizer)
        self.plain_model = accelerator.unwrap_model(self.model)

        peak = arguments.peak_tflops * 1e12 or peak_flops(device)
        sizes = (data.num_steps, is_main, device, data.steps_per_epoch, peak and peak * world_size)
        faster = "--image_processing fast" if arguments.image_processing == "exact" else "--cache_features FOLDER"
        advice = "" if arguments.cache_features else f"try {faster}, or more --dataloader_num_workers"
        self.logger = TrainingLogger(output_dir, *sizes, accelerator.log, advice)
        self.early_stopping = EarlyStopping(arguments.metric_for_best_model, arguments.early_stopping_patience)
        self.guard = guards.NonFiniteGuard(output_dir, arguments.nan_policy, accelerator.print)
        weights = (self.plain_model, self.optimizer, self.scheduler)
        tracked = {"data": data, "early_stopping": self.early_stopping, "guard": self.guard, "logger": self.logger}
        run = describe_run(arguments, data, world_size)
        self.checkpoints = Checkpoints(output_dir, arguments.save_total_limit, accelerator, run, weights, tracked)
        self.first_step = self.checkpoints.resume(arguments.resume_from_checkpoint)
        self.logger.start(self.first_step)
        self.record: dict[str, Any] = {
            "began": began,
            "first_step": self.first_step,
            "command": sys.argv,
            "options": {name: value for name, value in vars(arguments).items() if name != "given"},
            "num_steps": data.num_steps,
            "parameters": total,
            "trainable_parameters": trainable,
            "processes": world_size,
            "mixed_precision": accelerator.mixed_precision,
            "data": {"fingerprint": data.fingerprint, "records": data.report.records},
            "peak_flops": peak,
            "environment": describe_environment(),
        }
        if is_main:
            guards.write_run(output_dir / "run.json", self.record)
        accelerator.init_trackers("clip-phi", {name: str(value) for name, value in self.record["options"].items()})

    def to_device(self, pack: PackedBatch) -> PackedBatch:
        """A batch ready for the model."""
        return add_image_features(pack.to(self.accelerator.device), self.plain_model, self.cache)


# Loop.
def train(arguments: TrainingArguments) -> None:
    run = Run(arguments)
    arguments, accelerator, data, logger = run.arguments, run.accelerator, run.data, run.logger
    flops = FlopsPerToken.of(run.plain_model, run.processor.num_image_tokens)
    frozen = guards.frozen_hashes(run.plain_model)
    stop = StopSignal()
    packs_in_order = map(run.to_device, data.loader(run.first_step, arguments, run.processor, accelerator.device))
    run.model.train()
    for step in range(run.first_step + 1, data.num_steps + 1):
        best, is_last = run.early_stopping, step == data.num_steps
        if best.exhausted:  # the same on all ranks, and in a run that is resumed
            place = f"step {best.step:,} ({best.metric} {best.value:.4f}, in best/)"
            accelerator.print(f"early stopping: no improvement since {place}")
            break

        # The data of a step, and what it counts on all ranks.
        began = time.perf_counter()
        with guards.stalled_data_warning(partial(data.needs, step)):
            packs = [next(packs_in_order) for _ in range(arguments.gradient_accumulation_steps)]
        waited = time.perf_counter() - began
        counts = torch.tensor([[*flops.counts_of(pack), len(pack.skipped), stop.received] for pack in packs]).sum(0)
        loss, grad_norm, (*work, num_skipped, num_stopping) = train_step(run, step, packs, counts)
        done = StepCounts(*work)
        skipped = [skip for pack in packs for skip in pack.skipped]
        data.count(done.samples, gather_object(skipped) if num_skipped else [])
        logger.count(done, loss, waited)

        # Once in a while: one line of the log.
        if loss is not None and (step % arguments.logging_steps == 0 or is_last):
            rates = {f"learning_rate/{group['name']}": group["lr"] for group in run.optimizer.param_groups}
            logger.log(step, grad_norm=grad_norm, **rates)

        # Once in a while, and at the end: evaluate, and save the model.
        if step % arguments.eval_steps == 0 or is_last:
            with logger.pause():
                evaluate_and_save(run, step, is_last)

        # Once in a while, at the end, and when a signal asks for it: a training checkpoint.
        if step % arguments.save_steps == 0 or is_last or num_stopping or best.exhausted:
            with logger.pause(), guards.tolerate_write_errors("a training checkpoint", is_last or bool(num_stopping)):
                run.checkpoints.save(step)
        if num_stopping and not is_last:
            accelerator.print(f"stopped after step {step:,} by a signal; --resume_from_checkpoint continues from there")
            del packs_in_order  # ends the workers
            sys.exit(EXIT_STOPPED)

    guards.check_frozen(frozen, run.plain_model)
    finish(run)


def train_step(
    run: Run, step: int, packs: list[PackedBatch], counts: torch.Tensor
) -> tuple[float | None, float, list[int]]:
    """One update of the weights. Returns loss (None if the step is left out), gradient norm, and counts of all ranks.

    Every supervised token of all ranks and micro-batches has the same weight, however they are distributed.
    packs: this rank's micro-batches. counts: StepCounts of all of them, and what else is summed over the ranks."""
    accelerator, device = run.accelerator, run.accelerator.device
    loss_sum = torch.zeros((), device=device)
    totals = accelerator.reduce(counts.to(device, torch.float64, non_blocking=True), "sum")
    num_supervised = totals[StepCounts._fields.index("supervised")].clamp(min=1).float()
    with guards.oom_hint(step, packs, device):
        for index, pack in enumerate(packs):
            with nullcontext() if index == len(packs) - 1 else accelerator.no_sync(run.model):
                # DDP averages gradients over the ranks; the loss is divided by the tokens of all of them.
                output = run.model(**pack.inputs, use_cache=False, num_items_in_batch=num_supervised)
                loss = output.loss * accelerator.num_processes
                accelerator.backward(loss)
            loss_sum += loss.detach()
        trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        norm = gather(accelerator.clip_grad_norm_(trained, run.arguments.max_grad_norm or float("inf")), keep=True)
    # Checked before the weights change, and the same on all ranks: the one time in a step that the host waits.
    means = accelerator.reduce(torch.stack([loss_sum, norm.to(device)]), "mean")
    mean_loss, grad_norm, *summed = torch.cat([means, totals]).tolist()
    is_finite = run.guard.is_finite_step(step, mean_loss, grad_norm, scaled=accelerator.scaler is not None)
    if not is_finite:
        run.guard.handle_bad_step(step, packs, run.plain_model, (mean_loss, grad_norm), accelerator)
    elif run.guard.spikes_at(mean_loss):
        run.logger.log_spike(step, mean_loss, [origin for pack in packs for origin in pack.origins])
    if is_finite or accelerator.scaler is not None:  # the loss scaler must have its step, and skips the weights itself
        run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return (mean_loss if is_finite else None), grad_norm, [int(total) for total in summed]


def evaluate_and_save(run: Run, step: int, is_last: bool) -> None:
    """Evaluate, and write the model and its processor to the output folder, and to best/ if it is the best so far."""
    run.model.eval()
    evaluation = run.evaluator.evaluate(run.model, run.plain_model, run.to_device)
    is_best = run.early_stopping.update(step, run.logger.log_evaluation(step, evaluation))
    state = full_state_dict(run.accelerator, run.plain_model, run.arguments.merged)
    if run.accelerator.is_main_process:
        for folder in (run.output_dir, run.output_dir / "best")[: 2 if is_best else 1]:
            with guards.tolerate_write_errors(f"the model in {folder}", is_last):
                run.plain_model.save_pretrained(folder, merged=run.arguments.merged, state_dict=state)
                run.processor.save_pretrained(folder)
    run.accelerator.wait_for_everyone()
    run.model.train()


def finish(run: Run) -> None:
    """Write data_report.json and the results in run.json, and push the model."""
    run.logger.close(run.data.report)
    if run.accelerator.is_main_process:
        results = {
            "ended": time.strftime(guards.TIME_FORMAT),
            "held_out_loss": run.logger.eval_losses[-1][1],
            "best": run.early_stopping.state_dict(),
            "steps_left_out": run.guard.state["skipped"],
            "loss_spikes": run.guard.state["spikes"],
            "frozen_weights": "unchanged",
        }
        guards.write_run(run.output_dir / "run.json", run.record | results)
    run.accelerator.print(f"saved in {run.output_dir}; try: clip-phi caption --model {run.output_dir} IMAGE")
    if run.arguments.push_to_hub and run.accelerator.is_main_process:
        print(push(run.output_dir, run.arguments.push_to_hub, private=run.arguments.hub_private_repo or None))
    run.accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors(arguments.debug):
        train(arguments)
