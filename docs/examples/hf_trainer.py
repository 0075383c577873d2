"""Hugging Face's Trainer with a distillation loss: a small GPT-2 learns from a larger one.

pip install kdkernels transformers accelerate; python hf_trainer.py
"""

import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import kdkernels


class DistillationTrainer(Trainer):
    """Trainer whose loss is alpha T^2 KL(teacher, student) + (1 - alpha) CE(student, labels)."""

    def __init__(self, *args, teacher, temperature=2.0, alpha=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.options = {"temperature": temperature, "alpha": alpha}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # what follows each token
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(**inputs).logits
        # num_items_in_batch: the labels of all accumulated batches, on all processes.
        options = {"num_items": num_items_in_batch, "inplace": not return_outputs} | self.options
        loss = kdkernels.distillation_loss(outputs.logits, taught, labels, **options)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss


def gpt2(width):
    config = {"vocab_size": 256, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": width}
    return GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0))


def text():
    """The bytes of this file, 64 a sample."""
    tokens = torch.tensor(list(Path(__file__).read_bytes()))
    samples = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    return [{"input_ids": sample, "labels": sample} for sample in samples]


def main():
    set_seed(0)
    teacher, student = gpt2(128), gpt2(32)
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 30}
    quiet = {"logging_steps": 5, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, learning_rate=3e-3, use_cpu=True, **batches, **quiet)
        Trainer(teacher, args, train_dataset=text()).train()
        trainer = DistillationTrainer(student, args, train_dataset=text(), teacher=teacher)
        trainer.train()
    # Means of five steps.
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
