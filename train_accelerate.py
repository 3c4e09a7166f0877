"""Train Clip-Phi: accelerate launch train_accelerate.py --stage 1 (or 2). See --stage 1 --help and README.md."""

import sys

from clip_phi.training.arguments import TrainingArguments, parse_arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        arguments.check()
        train(arguments)
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"train_accelerate.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def train(arguments: TrainingArguments) -> None:
    # Heavy imports stay out of --help and of a wrong option.
    import time
    from contextlib import nullcontext
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object, set_seed
    from transformers.utils import logging

    from clip_phi.batching.loader import EndlessSampler, PictureReader, TreeDataset, complete, make_loader
    from clip_phi.batching.tree import Pack
    from clip_phi.evaluation.generate import held_out_loss
    from clip_phi.training.checkpoint import (
        EXIT_STOPPED,
        Checkpoints,
        StopSignal,
        check_same_run,
        describe_run,
        report_state,
        restore_report,
    )
    from clip_phi.training.data import read_data
    from clip_phi.training.monitor import Monitor
    from clip_phi.training.optim import make_optimizer, make_scheduler
    from clip_phi.training.setup import (
        count_parameters,
        eval_batches,
        load_model,
        load_processor,
        open_cache,
        sample_texts,
    )

    logging.disable_progress_bar()  # one bar is enough
    accelerator = Accelerator()
    device = accelerator.device
    set_seed(arguments.seed)

    processor = load_processor(arguments)
    model = load_model(arguments, processor, accelerator)
    cache = open_cache(arguments, model, processor)
    read = PictureReader(processor, arguments.pixels, cache)
    with accelerator.local_main_process_first():  # which writes the index that the others find
        rank, world_size = accelerator.process_index, accelerator.num_processes
        data = read_data(arguments, processor, read, rank, world_size, accelerator.print)
    trainable, total = count_parameters(model)
    accelerator.print(f"training {trainable:,} of {total:,} parameters on {accelerator.num_processes} x {device.type}")

    if data.batches is None:
        num_steps, order = arguments.max_steps, arguments.per_device_batch_size
    else:
        batches_per_step = arguments.gradient_accumulation_steps * accelerator.num_processes
        num_steps = max(1, -(-data.batches.count(arguments.num_epochs) // batches_per_step))
        num_steps = min(num_steps, arguments.max_steps or num_steps)
        order = EndlessSampler(
            batches=data.batches,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            num_steps=num_steps,
            rank=rank,
            world_size=world_size,
        )
    optimizer = make_optimizer(model, arguments, device)
    scheduler = make_scheduler(optimizer, arguments, num_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)

    def ready(pack: Pack) -> Pack:
        return complete(pack.to(device), plain_model, cache)

    eval_loaders = {
        name: make_loader(
            TreeDataset([index], read), eval_batches(len(index), arguments, rank, world_size), processor, 0
        )
        for name, index in data.held_out.items()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output_dir = Path(arguments.output_dir)
    checkpoints = Checkpoints(output_dir, arguments.keep, accelerator)
    this_run = describe_run(arguments, data.fingerprint, num_steps, world_size)
    first_step = 0
    if not arguments.resume:
        checkpoints.begin_anew()
    elif found := checkpoints.newest():
        place, about = found
        check_same_run(about["run"], this_run, accelerator.print)
        checkpoints.restore(place, plain_model, optimizer, scheduler)
        restore_report(data.report, about["report"])
        assert isinstance(order, EndlessSampler)  # a stream cannot be resumed, and check() says so
        first_step = order.first_step = about["step"]
        accelerator.print(f"going on from {place}, after step {first_step:,} of {num_steps:,}")
    monitor = Monitor(output_dir, num_steps, accelerator.is_main_process, first_step)
    stop = StopSignal()
    pin_memory = device.type == "cuda"
    packs_in_order = map(ready, make_loader(data.train, order, processor, arguments.num_workers, pin_memory))

    model.train()
    for step in range(first_step + 1, num_steps + 1):
        # One step: every answer token of all ranks and micro-batches weighs the same, however they are spread.
        began = time.perf_counter()
        packs = [next(packs_in_order) for _ in range(arguments.gradient_accumulation_steps)]
        waited = time.perf_counter() - began
        counts = torch.tensor([[p.num_supervised, p.num_branches, len(p.skipped), stop.asked] for p in packs])
        counts = accelerator.reduce(counts.sum(0).to(device), "sum").tolist()
        num_supervised, num_branches, num_skipped, num_stopping = counts
        skipped = [skip for pack in packs for skip in pack.skipped]
        data.count(num_branches, gather_object(skipped) if num_skipped else [])
        step_loss = torch.zeros((), device=device)
        for index, pack in enumerate(packs):
            with nullcontext() if index == len(packs) - 1 else accelerator.no_sync(model):
                # DDP averages gradients over the ranks; the loss is divided by the tokens of all of them.
                output = model(**pack.inputs, use_cache=False, num_items_in_batch=max(num_supervised, 1))
                loss = output.loss * accelerator.num_processes
                accelerator.backward(loss)
            step_loss += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(trained, arguments.max_grad_norm or float("inf"))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        monitor.count(num_branches, num_supervised, waited)

        # Once in a while: one line of the log.
        if step % arguments.log_every == 0 or step == num_steps:
            mean_loss = accelerator.reduce(step_loss, "mean").item()
            if not (grad_norm.isfinite() and mean_loss == mean_loss):
                origins = ", ".join(origin for pack in packs for origin in pack.origins)
                raise ValueError(f"step {step}: loss {mean_loss}, gradient norm {grad_norm}; its samples: {origins}")
            monitor.log(step, mean_loss, learning_rate=scheduler.get_last_lr()[0], grad_norm=grad_norm.item())

        # Once in a while, and at the end: evaluate, and save the model.
        if step % arguments.eval_every == 0 or step == num_steps:
            started = time.perf_counter()
            model.eval()
            sums = {
                name: accelerator.reduce(held_out_loss(model, map(ready, loader), device), "sum").tolist()
                for name, loader in eval_loaders.items()
            }
            texts = []
            if accelerator.is_main_process:
                for held_out in data.held_out.values():
                    texts += sample_texts(plain_model, processor, held_out, arguments)
            monitor.log_evaluation(step, sums, texts)
            if accelerator.is_main_process:
                plain_model.save_pretrained(output_dir, merged=arguments.merged)
                processor.save_pretrained(output_dir)
            accelerator.wait_for_everyone()
            model.train()
            monitor.pause(time.perf_counter() - started)

        # Once in a while, at the end, and when a signal asks for it: a checkpoint to go on from.
        if step % arguments.save_every == 0 or step == num_steps or num_stopping:
            started = time.perf_counter()
            about = {"run": this_run, "report": report_state(data.report)}
            checkpoints.save(step, plain_model, optimizer, scheduler, about)
            monitor.pause(time.perf_counter() - started)
        if num_stopping and step < num_steps:
            accelerator.print(f"stopped after step {step:,} by a signal; --resume goes on from there")
            del packs_in_order  # ends the workers
            sys.exit(EXIT_STOPPED)

    monitor.close(data.report)
    accelerator.print(f"saved in {output_dir}; try: clip-phi caption --checkpoint {output_dir} IMAGE")
    accelerator.end_training()


if __name__ == "__main__":
    main()
