"""Train a Clip-Phi model with TRL's SFTTrainer, and save the result as a delta again.

    pip install 'clip-phi[trl]'
    python examples/trl_sft.py --model outputs/stage1 --output_dir outputs/trl \\
        --data llava:outputs/demo/data/llava_instruct_train.json,images=outputs/demo/data/train2017
    clip-phi evaluate outputs/trl --task vqa --data ...

The projector is trained, and with --lora_r LoRA on the decoder too. Tower and decoder are frozen. DPOTrainer and
GRPOTrainer take the same model and processor; without peft, DPOTrainer needs a ref_model for a model that has no
folder. TRL pads each batch: train_accelerate.py trains several times faster on the same data.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from clip_phi.data.report import Report
from clip_phi.data.sample import as_messages, images_of
from clip_phi.data.source import parse_source
from clip_phi.evaluation.tasks import read_samples
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="outputs/stage1", help="folder or Hub id of a delta model")
    parser.add_argument("--data", required=True, help="[KIND:]PATH[,option=value...], as in train_accelerate.py")
    parser.add_argument("--output_dir", default="outputs/trl", help="folder for the trained model")
    parser.add_argument("--lora_r", type=int, default=0, help="rank of LoRA on the decoder; 0: the projector alone")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="peak, of all trained weights")
    parser.add_argument("--per_device_train_batch_size", type=int, default=4, help="conversations in a forward pass")
    parser.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the data")
    parser.add_argument("--max_steps", type=int, default=-1, help="number of steps instead of --num_train_epochs")
    return parser.parse_args()


def conversations(data: str) -> Iterator[dict[str, Any]]:
    """Records for TRL: the path or bytes of the images, and the messages; <image> places are added by TRL."""
    report = Report()
    for sample in read_samples([parse_source(data)], report):
        for conversation in sample.conversations:
            messages = as_messages(conversation, 0)
            texts = ["".join(item["text"] for item in message["content"]) for message in messages]
            turns = [{"role": message["role"], "content": text} for message, text in zip(messages, texts, strict=True)]
            images = images_of(sample.image)
            if images:
                content = [{"bytes": image if isinstance(image, bytes) else image.read()} for image in images]
                yield {"images": content, "messages": turns}
    report.refuse_bad(0.01)


def main() -> None:
    arguments = parse_arguments()
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise SystemExit("this example needs TRL: pip install 'clip-phi[trl]'") from error
    from datasets import Dataset, Features, Image, List, Value
    from peft import LoraConfig

    model = ClipPhiForCausalLM.from_pretrained(arguments.model)
    processor = ClipPhiProcessor.from_pretrained(arguments.model)
    if arguments.lora_r:
        # "model.language_model." keeps LoRA off the tower, whose layers have the same names.
        layers = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|dense|o_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
        model.add_adapter(LoraConfig(r=arguments.lora_r, lora_alpha=2 * arguments.lora_r, target_modules=layers))
        model.model.projector.requires_grad_(True)
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"images": List(Image()), "messages": List(message)})
    data = Dataset.from_list(list(conversations(arguments.data)), features=features)
    settings = SFTConfig(
        output_dir=f"{arguments.output_dir}/checkpoints",
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        assistant_only_loss=True,  # answers and their end tokens, as train_accelerate.py does
        max_length=None,  # image tokens must not be cut
        gradient_checkpointing=False,
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
    )
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.model.save_pretrained(arguments.output_dir)  # with peft_config: trainer.model.get_base_model()
    processor.save_pretrained(arguments.output_dir)
    print(f"saved in {arguments.output_dir}")


if __name__ == "__main__":
    main()
