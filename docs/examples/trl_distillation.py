"""TRL's DistillationTrainer, on the student's own answers, with this library's fused linear loss:
the logits are never in memory.

pip install kdkernels trl; python trl_distillation.py
"""

import tempfile

from datasets import Dataset
from transformers import set_seed
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer
from trl_gkd import SUMS, gpt2, tokenizer  # the example beside this one

import kdkernels.compat

# TRL 1.16 has no place to choose the loss; this is where its trainer finds it.
distillation_trainer._chunked_divergence_loss = kdkernels.compat.chunked_divergence_loss


def main():
    set_seed(0)
    options = {"beta": 0.5, "max_completion_length": 4, "max_steps": 30, "learning_rate": 3e-3}
    options |= {"use_cpu": True, "bf16": False, "logging_steps": 5}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    data = Dataset.from_dict({"prompt": [messages[:1] for messages in SUMS]})
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(folder, **options, **quiet)
        trainer = DistillationTrainer(
            gpt2(32), gpt2(64), args, train_dataset=data, processing_class=tokenizer()
        )
        trainer.train()
    # Means of five steps.
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
