"""``kdkernels predict-teacher``: a teacher's predictions, made once for any number of runs."""

import dataclasses
from typing import Any

import torch
from torch import nn

from kdkernels.tools.settings import Predict
from kdkernels.train import TrainError, checks, models, predictions
from kdkernels.train import console as terminal
from kdkernels.train.images import Images
from kdkernels.train.session import choose_device, reproducible
from kdkernels.train.settings import Distil


def command(_: str, given: dict[str, Any]) -> int:
    """Make the predictions, or those that the folder does not have yet."""
    console = terminal.make()
    names = {field.name for field in dataclasses.fields(Predict)}
    wanted = Predict(**{k: v for k, v in given.items() if k in names})
    alike = {k: v for k, v in given.items() if k not in ("out", "top_k", "dtype", "batch_size")}
    distil = Distil(**alike)  # so that distill's images are these
    device = choose_device(distil.device)
    try:
        with reproducible(distil.seed, distil.threads), terminal.progress(console) as show:
            train = checks.images_of(distil)[0].to(device)
            found = predictions.write(
                wanted.out,
                _teacher(wanted, distil, train),
                train,
                batch_size=wanted.batch_size,
                top_k=wanted.top_k,
                dtype=wanted.dtype,
                memory_format=torch.channels_last,
                on_step=show[0],
            )
    except KeyboardInterrupt:
        raise TrainError("interrupted: the same command continues", status=130) from None
    views = distil.views or 1
    console.print(
        f"{wanted.out} holds the predictions of {len(found):,} images in {views} "
        f"{'view' if views == 1 else 'views'}: {found.nbytes / 1e6:,.2f} MB, "
        f"{found.nbytes / (len(found) * views):,.1f} bytes per image and view; the teacher is "
        f"right about {found.accuracy(train):.1%} of them"
    )
    return 0


def _teacher(wanted: Predict, distil: Distil, train: Images) -> nn.Module:
    if wanted.top_k is not None and wanted.top_k > train.classes:
        raise TrainError(f"top_k {wanted.top_k}: the images have {train.classes} classes")
    weights = wanted.teacher_weights
    model, ready = models.build(distil.teacher, train.classes, distil.image_size, weights)
    if not ready:
        raise TrainError(
            f"teacher_weights {weights}: this teacher has not learnt these {train.classes} "
            "classes; distill trains one and leaves checkpoints/teacher.safetensors"
        )
    model = model.to(train.labels.device).to(memory_format=torch.channels_last)
    checks.try_on("teacher", model, train)
    return model
