"""Text to learn from: files, a byte-pair vocabulary trained on them, and windows of their tokens.

What is made of the files is kept in ``~/.cache/kdkernels`` (or below ``XDG_CACHE_HOME``), in a
folder named by a hash of the text and the size of the vocabulary:

    tokenizer.json                  of the ``tokenizers`` package
    training.i32, held-out.i32      token ids, int32, little-endian, the files one after the other
"""

import dataclasses
import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdkernels.train import TrainError
from kdkernels.train.run_folder import cache_folder

END = "<|endoftext|>"
"""The token after each file; number 0."""

HELD_OUT = 20
"""One file of so many is held out."""

_LAYOUT = b"1"  # of the cached folder: a change of what is written changes its name


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of a text; the samples of a :class:`kdkernels.train.loop.Learner`.

    ``tokens`` ``[n]`` int32 are a memory map, in which each window of ``context`` tokens begins at
    one of ``first`` ``[samples]`` int64. Equal digests are of equal tokens.
    """

    tokens: np.ndarray
    first: np.ndarray
    context: int
    device: torch.device
    digest: str

    def __len__(self) -> int:
        return len(self.first)

    def view_of(self, epoch: int) -> None:
        """None: windows have but one view."""

    def batch(self, index: torch.Tensor, memory_format=None, view=None):
        """The windows ``index`` and what follows each of their tokens: ``[b, context]`` int64."""
        begins = self.first[index.cpu().numpy()][:, None]
        rows = self.tokens[begins + np.arange(self.context + 1)].astype(np.int64)
        rows = torch.from_numpy(rows).to(self.device)
        return rows[:, :-1], rows[:, 1:]

    def sample(self, count: int | None, seed: int) -> "Text":
        """``count`` windows drawn without replacement; all of them, shuffled, where there are fewer
        or ``count`` is None.
        """
        order = np.random.default_rng(seed).permutation(len(self))[:count]
        return dataclasses.replace(self, first=self.first[order])


_NOT_TEXT = ("site-packages", "dist-packages", "__pycache__")


def documents(source: str | None = None) -> list[str]:
    """The texts of files, in the order of their paths.

    ``source``: a file, or a folder, whose files are taken with those of folders in it; None: the
    ``.py`` files of the standard library of the Python that runs. Names that begin with a dot, and
    files that are not UTF-8 or hold a NUL, are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if source is None else source)
    if not root.exists():
        raise TrainError(f"text {source}: there is no such file or folder")
    paths = [root] if root.is_file() else root.rglob("*.py" if source is None else "*")
    texts = []
    for path in sorted(paths, key=lambda path: path.as_posix()):
        inside = path.relative_to(root).parts
        if not path.is_file() or any(p[0] == "." or p in _NOT_TEXT for p in inside):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise TrainError(f"text: cannot read {path}: {error.strerror}") from None
        if text and "\0" not in text:
            texts.append(text)
    if not texts:
        raise TrainError(f"text {source}: no text in UTF-8 there")
    return texts


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: files by the order of their hashes; of a single file its end."""
    if len(texts) == 1:
        cut = texts[0].rfind("\n", 0, len(texts[0]) * (HELD_OUT - 1) // HELD_OUT) + 1
        cut = cut or len(texts[0]) * (HELD_OUT - 1) // HELD_OUT
        return [texts[0][:cut]], [texts[0][cut:]]
    order = sorted(range(len(texts)), key=lambda i: (hashlib.sha256(texts[i].encode()).digest(), i))
    held = set(order[: max(1, len(texts) // HELD_OUT)])
    return (
        [text for i, text in enumerate(texts) if i not in held],
        [texts[i] for i in sorted(held)],
    )


def _train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write_tokens(path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    end = tokenizer.token_to_id(END)
    with path.open("wb") as file:
        for at in range(0, len(texts), 64):
            for found in tokenizer.encode_batch(texts[at : at + 64]):
                np.array([*found.ids, end], "<i4").tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _make(folder: Path, texts: list[str], vocabulary: int) -> None:
    """Write the cached folder, whole or not at all; another process may be doing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        training, held_out = _split(texts)
        tokenizer = _train_tokenizer(training, vocabulary)
        tokenizer.save(str(beside / "tokenizer.json"))
        _write_tokens(beside / "training.i32", tokenizer, training)
        _write_tokens(beside / "held-out.i32", tokenizer, held_out)
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load(
    source: str | None,
    vocabulary: int,
    context: int,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Text, Text, Tokenizer]:
    """Training and held-out windows of ``context`` tokens, and the tokenizer.

    Windows follow each other without overlap; they run over the ends of files. The vocabulary has
    at least 257 entries; a small text gives fewer than ``vocabulary``. ``say`` is called with a
    line if it has yet to be trained. TrainError: the cache cannot be written; the text is too
    short.
    """
    texts = documents(source)
    digest = hashlib.sha256(_LAYOUT)
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    folder = cache_folder() / f"text-{digest.hexdigest()[:20]}-{vocabulary}"
    if not folder.exists():
        size = sum(len(text.encode()) for text in texts)
        say(f"training a vocabulary of {vocabulary:,} on {len(texts):,} files, {size / 1e6:.3g} MB")
        try:
            _make(folder, texts, vocabulary)
        except OSError as error:
            raise TrainError(f"cannot write {folder}: {error.strerror}") from None
    parts = []
    for name in ("training", "held-out"):
        path = folder / f"{name}.i32"
        try:
            count = path.stat().st_size // 4
            windows = (count - 1) // context
            if windows < 1:
                raise TrainError(
                    f"the {name} text has {count:,} tokens, less than a window of {context} and "
                    "the token after it: give a longer text or a smaller context"
                )
            tokens = np.memmap(path, "<i4", "r")
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except TrainError:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            raise TrainError(f"{folder} cannot be read ({error}): delete it") from None
        first = np.arange(windows, dtype=np.int64) * context
        parts.append(Text(tokens, first, context, device, folder.name.removeprefix("text-")))
    return *parts, tokenizer
