"""TRL's generalized knowledge distillation (GKD), half of it on the student's own answers, with
this library's divergence.

pip install kdkernels trl; python trl_gkd.py
"""

import tempfile

from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl.experimental.gkd import GKDConfig, GKDTrainer

import kdkernels.compat


class FusedGKDTrainer(GKDTrainer):
    """GKDTrainer whose divergence and its gradient are made by one kernel."""

    generalized_jsd_loss = staticmethod(kdkernels.compat.generalized_jsd_loss)


SUMS = [
    [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]
    for a in range(10)
    for b in range(10)
]


def tokenizer():
    """A tokenizer of bytes, made here."""
    of_bytes, special = ByteLevelBPETokenizer(), {"pad_token": "<pad>", "eos_token": "<eos>"}
    of_bytes.train_from_iterator([], vocab_size=258, special_tokens=[*special.values()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(of_bytes.to_str()), **special
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def gpt2(width):
    """A model of random weights; yours comes from from_pretrained."""
    config = {"vocab_size": 258, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": width}
    config |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**config))


def main():
    set_seed(0)
    options = {"lmbda": 0.5, "beta": 0.5, "max_new_tokens": 4, "max_length": 64, "max_steps": 30}
    options |= {"learning_rate": 3e-3, "use_cpu": True, "bf16": False, "logging_steps": 5}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    data = Dataset.from_dict({"messages": SUMS})
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(folder, **options, **quiet)
        trainer = FusedGKDTrainer(
            gpt2(32), gpt2(64), args, train_dataset=data, processing_class=tokenizer()
        )
        trainer.train()
    # Means of five steps.
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
