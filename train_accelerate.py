"""Train Clip-Phi: accelerate launch train_accelerate.py --stage 1 (or 2). See --stage 1 --help and README.md."""

import os
import sys

from clip_phi.training.arguments import TrainingArguments, parse_arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        arguments.check()
        train(arguments)
    except (ValueError, OSError, ImportError) as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # so that the launcher's last words name this process and error
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        if arguments.debug:
            raise
        print(f"train_accelerate.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def train(arguments: TrainingArguments) -> None:
    # Heavy imports stay out of --help and of a wrong option.
    import time
    from contextlib import nullcontext
    from functools import partial
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object, set_seed
    from transformers.utils import logging

    from clip_phi.batching.dataset import ImageReader, SampleDataset, complete, make_loader
    from clip_phi.batching.packing import PackedBatch
    from clip_phi.batching.sampler import EndlessSampler
    from clip_phi.environment import describe_environment, peak_flops
    from clip_phi.evaluation.generate import held_out_loss
    from clip_phi.hub.push import Target, check_push, push
    from clip_phi.training.checkpoint import (
        EXIT_STOPPED,
        Checkpoints,
        EarlyStopping,
        StopSignal,
        check_same_run,
        describe_run,
        report_state,
        restore_report,
    )
    from clip_phi.training.data import read_data
    from clip_phi.training.evaluate import eval_batches, make_eval_task, run_eval_task, sample_texts
    from clip_phi.training.fsdp import (
        check_fsdp_config,
        full_state_dict,
        full_tensor,
        is_sharded,
        prepare,
        process_group_kwargs,
    )
    from clip_phi.training.guards import (
        NonFiniteGuard,
        check_frozen,
        check_room,
        frozen_hashes,
        oom_hint,
        room_needed,
        stalled_data_warning,
        tolerate_write_errors,
        write_run,
    )
    from clip_phi.training.logger import FlopsPerToken, Monitor, StepCounts
    from clip_phi.training.model import count_parameters, load_model, load_processor, open_cache
    from clip_phi.training.optim import make_optimizer, make_scheduler, optimizer_bytes

    logging.disable_progress_bar()  # one bar is enough
    began_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    output_dir = Path(arguments.output_dir)
    check_room(output_dir)
    accelerator = Accelerator(
        kwargs_handlers=process_group_kwargs(), log_with=arguments.report_to or None, project_dir=str(output_dir)
    )
    check_fsdp_config(accelerator, arguments, accelerator.print)
    device = accelerator.device
    set_seed(arguments.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")

    processor = load_processor(arguments)
    model = load_model(arguments, processor, accelerator)
    if arguments.push_to_hub and accelerator.is_main_process:  # better now than after a night of training
        check_push(arguments.push_to_hub, model.config.to_dict(), arguments.merged, output_dir)
    cache = open_cache(arguments, model, processor)
    read = ImageReader(processor, arguments.image_processing, cache)
    with accelerator.local_main_process_first():  # which writes the index that the others find
        rank, world_size = accelerator.process_index, accelerator.num_processes
        data = read_data(arguments, processor, read, rank, world_size, accelerator.print)
    eval_set = make_eval_task(arguments, data.held_out)
    trainable, total = count_parameters(model)
    accelerator.print(f"training {trainable:,} of {total:,} parameters on {accelerator.num_processes} x {device.type}")
    models = 1 if arguments.metric_for_best_model == "none" else 2
    room = room_needed(trainable, total, arguments.save_total_limit, arguments.merged, model.dtype.itemsize, models)
    check_room(output_dir, room)
    costs = FlopsPerToken.of(model)

    if data.batches is None:
        num_steps, order, steps_per_epoch = arguments.max_steps, arguments.per_device_train_batch_size, None
    else:
        batches_per_step = arguments.gradient_accumulation_steps * accelerator.num_processes
        num_steps = max(1, -(-data.batches.count(arguments.num_train_epochs) // batches_per_step))
        num_steps = min(num_steps, arguments.max_steps or num_steps)
        steps_per_epoch = data.batches.count(1) / batches_per_step
        order = EndlessSampler(
            batches=data.batches,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            num_steps=num_steps,
            rank=rank,
            world_size=world_size,
        )
    optimizer = make_optimizer(model, arguments, device)
    scheduler = make_scheduler(optimizer, arguments, num_steps)
    model, optimizer = prepare(accelerator, model, optimizer)
    plain_model = accelerator.unwrap_model(model)

    def ready(pack: PackedBatch) -> PackedBatch:
        return complete(pack.to(device), plain_model, cache)

    eval_loaders = {
        name: make_loader(
            SampleDataset([index], read), eval_batches(len(index), arguments, rank, world_size), processor, 0
        )
        for name, index in data.held_out.items()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpoints = Checkpoints(output_dir, arguments.save_total_limit, accelerator)
    this_run = describe_run(arguments, data.fingerprint, num_steps, world_size)
    first_step, seen, best = (
        0,
        StepCounts(),
        EarlyStopping(arguments.metric_for_best_model, arguments.early_stopping_patience),
    )
    if not arguments.resume_from_checkpoint:
        checkpoints.begin_anew()
    elif found := checkpoints.newest():
        place, about = found
        check_same_run(about["run"], this_run, accelerator.print)
        checkpoints.restore(place, plain_model, optimizer, scheduler)
        restore_report(data.report, about["report"])
        assert isinstance(order, EndlessSampler)  # a stream cannot be resumed, and check() says so
        first_step = order.first_step = about["step"]
        seen = about["seen"]
        best.restore(about.get("best"))
        accelerator.print(f"going on from {place}, after step {first_step:,} of {num_steps:,}")
    peak = arguments.peak_tflops * 1e12 or peak_flops(device)
    monitor = Monitor(
        output_dir,
        num_steps,
        accelerator.is_main_process,
        device,
        first_step=first_step,
        steps_per_epoch=steps_per_epoch,
        peak=peak and peak * world_size,
        track=accelerator.log,
    )
    monitor.go_on(seen)
    health = NonFiniteGuard(output_dir, arguments.nan_policy, accelerator.print)
    run = {
        "command": sys.argv,
        "began": began_at,
        "options": vars(arguments),
        "first_step": first_step,
        "num_steps": num_steps,
        "parameters": total,
        "trainable_parameters": trainable,
        "processes": world_size,
        "mixed_precision": accelerator.mixed_precision,
        "data": {"fingerprint": data.fingerprint, "records": data.report.records},
        "peak_flops": peak,
        "environment": describe_environment(),
    }
    if accelerator.is_main_process:
        write_run(output_dir / "run.json", run)
    accelerator.init_trackers("clip-phi", {name: str(value) for name, value in vars(arguments).items()})
    frozen = frozen_hashes(plain_model)
    stop = StopSignal()
    pin_memory = device.type == "cuda"
    packs_in_order = map(ready, make_loader(data.train, order, processor, arguments.dataloader_num_workers, pin_memory))

    model.train()
    for step in range(first_step + 1, num_steps + 1):
        if best.exhausted:  # known to all ranks, and to a run that is resumed
            accelerator.print(f"stopped: {best.metric} was never better than at step {best.step:,}, which is in best/")
            break
        # One step: every answer token of all ranks and micro-batches weighs the same, however they are spread.
        began = time.perf_counter()
        with stalled_data_warning(partial(data.awaited, order, step)):
            packs = [next(packs_in_order) for _ in range(arguments.gradient_accumulation_steps)]
        waited = time.perf_counter() - began
        counts = torch.tensor([[*costs.work(p), len(p.skipped), stop.asked] for p in packs]).sum(0).to(device)
        *work, num_skipped, num_stopping = accelerator.reduce(counts, "sum").tolist()
        done = StepCounts(*work)
        skipped = [skip for pack in packs for skip in pack.skipped]
        data.count(done.samples, gather_object(skipped) if num_skipped else [])
        step_loss = torch.zeros((), device=device)
        with oom_hint(step, packs, device):
            for index, pack in enumerate(packs):
                with nullcontext() if index == len(packs) - 1 else accelerator.no_sync(model):
                    # DDP averages gradients over the ranks; the loss is divided by the tokens of all of them.
                    output = model(**pack.inputs, use_cache=False, num_items_in_batch=max(done.supervised, 1))
                    loss = output.loss * accelerator.num_processes
                    accelerator.backward(loss)
                step_loss += loss.detach()
            norm = full_tensor(accelerator.clip_grad_norm_(trained, arguments.max_grad_norm or float("inf")))
        # Known before the weights change, and the same on all ranks. The next step begins with a wait for the device
        # anyway.
        mean_loss, grad_norm = accelerator.reduce(torch.stack([step_loss, norm.to(device)]), "mean").tolist()
        allowed = health.is_finite_step(step, mean_loss, grad_norm, scaled=accelerator.scaler is not None)
        if not allowed:
            health.handle_bad_step(step, packs, plain_model, (mean_loss, grad_norm), accelerator)
        elif health.spikes_at(mean_loss):
            monitor.log_spike(step, mean_loss, [origin for pack in packs for origin in pack.origins])
        if allowed or accelerator.scaler is not None:  # the scaler must be told, and leaves the weights alone itself
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        monitor.count(done, waited)

        # Once in a while: one line of the log.
        if allowed and (step % arguments.logging_steps == 0 or step == num_steps):
            rates = {f"learning_rate/{group['name']}": group["lr"] for group in optimizer.param_groups}
            monitor.log(step, mean_loss, grad_norm=grad_norm, **rates)

        # Once in a while, and at the end: evaluate, and save the model.
        if step % arguments.eval_steps == 0 or step == num_steps:
            started = time.perf_counter()
            model.eval()
            sums = {
                name: accelerator.reduce(held_out_loss(model, map(ready, loader), device), "sum").tolist()
                for name, loader in eval_loaders.items()
            }
            texts = []
            if accelerator.is_main_process or is_sharded(accelerator):
                for held_out in data.held_out.values():
                    texts += sample_texts(plain_model, processor, held_out, arguments)
            judged = run_eval_task(plain_model, processor, eval_set, arguments, accelerator, is_sharded(accelerator))
            is_best = best.update(step, monitor.log_evaluation(step, sums, texts, judged))
            state = full_state_dict(accelerator, plain_model, arguments.merged)
            if accelerator.is_main_process:
                for folder in (output_dir, output_dir / "best")[: 2 if is_best else 1]:
                    with tolerate_write_errors(f"the model in {folder}", last=step == num_steps):
                        plain_model.save_pretrained(folder, merged=arguments.merged, state_dict=state)
                        processor.save_pretrained(folder)
            accelerator.wait_for_everyone()
            model.train()
            monitor.pause(time.perf_counter() - started)

        # Once in a while, at the end, and when a signal asks for it: a checkpoint to go on from.
        if step % arguments.save_steps == 0 or step == num_steps or num_stopping or best.exhausted:
            started = time.perf_counter()
            about = {"run": this_run, "report": report_state(data.report), "seen": monitor.seen, "best": best.state()}
            with tolerate_write_errors("a checkpoint", last=step == num_steps or bool(num_stopping)):
                checkpoints.save(step, plain_model, optimizer, scheduler, about)
            monitor.pause(time.perf_counter() - started)
        if num_stopping and step < num_steps:
            accelerator.print(f"stopped after step {step:,} by a signal; --resume_from_checkpoint goes on from there")
            del packs_in_order  # ends the workers
            sys.exit(EXIT_STOPPED)

    check_frozen(frozen, plain_model)
    monitor.close(data.report)
    if accelerator.is_main_process:
        results = {
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "held_out_loss": monitor.eval_losses[-1][1],
            "best": best.state(),
            "steps_left_out": health.num_skipped,
            "loss_spikes": health.spikes,
            "optimizer_bytes": optimizer_bytes(optimizer),
            "frozen_weights": "unchanged",
        }
        write_run(output_dir / "run.json", run | results)
    accelerator.print(f"saved in {output_dir}; try: clip-phi caption --model {output_dir} IMAGE")
    if arguments.push_to_hub and accelerator.is_main_process:
        print(push(output_dir, Target(arguments.push_to_hub, private=arguments.hub_private_repo or None)))
    accelerator.end_training()


if __name__ == "__main__":
    main()
