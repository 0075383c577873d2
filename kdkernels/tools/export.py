"""A finished student made ready for the edge: ONNX in fp32, in int8, in int8 trained for it.

All three are ONNX files that onnxruntime runs as they are, on servers and on phones. The int8
files hold quantise and dequantise operations around each layer (QDQ), which the runtime fuses
into integer kernels. One graph, of :mod:`kdkernels.tools.int8`, serves both of them: calibrated
only, or trained on for a few epochs with the teacher's predictions and the rounding in place.
(torch.compile of an int8 graph needs PyTorch and a compiler on the device, and was slower.)

Everything is on the CPU, whatever the run was trained on. What it finds is in the run's folder
under export/: ARM.onnx, ARM-int8.onnx, ARM-int8-qat.onnx, results.json, and a run folder's own
config.json, metrics.jsonl and checkpoints of the training with quantisation.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import statistics
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import kdkernels
from kdkernels.measuring import take_turns
from kdkernels.tools.settings import FORMATS, Export
from kdkernels.train import TrainError, checks, loop, models, session
from kdkernels.train.images import Images
from kdkernels.train.run_folder import RunFolder, load_state, state_of
from kdkernels.train.settings import ARMS, NOISY, Distil

FOLDER = "export"
"""Everything goes into this folder of the run's."""

CALIBRATION = 512
"""Training images, the first ones, that the ranges of activations are found with."""

BATCHES = (1, 32)
"""Images a call whose latency is measured."""

ROUNDS = 30
TOLERANCE = 1e-4
"""Largest difference of onnxruntime's fp32 logits from PyTorch's, of the largest logit."""


@dataclasses.dataclass
class _Finished:
    """What a finished run left: its settings, its student, and its images."""

    settings: Distil
    student: nn.Module
    sha256: str
    train: Images
    test: Images


def _networks(settings: Distil, classes: int) -> tuple[nn.Module, nn.Module]:
    """The run's teacher and student with random weights; what the checkpoints are loaded into."""
    return (
        models.build(settings.teacher, classes, settings.image_size)[0],
        models.build(settings.student, classes, settings.image_size)[0],
    )


def _finished(folder: RunFolder, arm: str) -> _Finished:
    """Read the run; TrainError where it is not of distill, lacks the arm, or is not finished."""
    if "distill" not in folder.config:
        raise TrainError(f"{folder.path} holds no run of distill or reproduce to export from")
    asked = folder.config["distill"]
    if folder.config.get("command") == "distill()":
        raise TrainError(
            f"the models and images of {folder.path} were given in Python: export its student "
            "there, with torch.onnx.export(found.student, ...)"
        )
    settings = Distil(**asked)
    found = folder.load(arm)
    if found is None or arm not in _arms(folder):
        there = ", ".join(_arms(folder)) or "none"
        raise TrainError(f"{folder.path} has no checkpoint of an arm {arm}; there are: {there}")
    tensors, state = found
    target, reached = settings.target_accuracy, state.get("measures", {}).get("accuracy", -1)
    done = state["epoch"] >= settings.epochs or (target is not None and reached >= target)
    if settings.budget is not None:  # then its end is when it is tested
        done = done or folder.checkpoint(f"{arm}-test").exists()
    if not done:
        raise TrainError(
            f"arm {arm} has done {state['epoch']} of {settings.epochs} epochs: finish the run "
            f"with kdkernels distill --resume {folder.path}"
        )
    _, train, test = checks.images_of(settings)
    student, path = _networks(settings, train.classes)[1], folder.checkpoint(arm)
    load_state(student, tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _Finished(settings, student.eval(), digest, train, test)


def _arms(folder: RunFolder) -> list[str]:
    """Arms that have a checkpoint, in any generation."""
    names = sorted(path.stem for path in (folder.path / "checkpoints").glob("*.safetensors"))
    known = {*ARMS, NOISY}
    return [n for n in names if n in known or n.rpartition("-g")[0] in known]


def _taught(folder: RunFolder, run: _Finished):
    """What a learner asks its teacher: kept predictions, or the teacher for images in new views."""
    found = folder.load("teacher")
    if found is None:
        raise TrainError(
            f"{folder.path} has no checkpoints/teacher.safetensors, which int8-qat needs; "
            "leave it out of formats"
        )
    expert = _networks(run.settings, run.train.classes)[0]
    load_state(expert, found[0], folder.checkpoint("teacher"))
    expert = expert.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    rows = loop.predictions(expert, run.train, run.settings.batch_size, torch.channels_last)

    def predict(images, index, view):
        if view is None:
            return rows[index]
        with torch.no_grad():
            return expert(images)

    return predict


def _batches(images: Images, count: int, size: int = 64) -> list[torch.Tensor]:
    index = torch.arange(min(count, len(images)))
    return [images.batch(part)[0] for part in index.split(size)]


def _trained(folder, home, run, settings, interrupt, on_step, say):
    """The student with quantisation in its graph, trained on; continues a checkpoint in home."""
    from kdkernels.tools import int8

    name = f"{settings.arm}-int8-qat"
    soft = {
        k: getattr(run.settings, k)
        for k in ("temperature", "alpha", "divergence", "beta")
        if getattr(run.settings, k) is not None
    }
    seed = run.settings.seed
    torch.manual_seed(seed)
    with _exported(run.student):
        model = int8.FakeQuantised(run.student, _batches(run.train, CALIBRATION, CALIBRATION)[0])
    learner = loop.Learner(
        name,
        model,
        lambda logits, taught, labels: kdkernels.distillation_loss(logits, taught, labels, **soft),
        _taught(folder, run),
        lambda model: loop.accuracy(model, run.test),
        settings.lr,
        seed + 3,
    )
    wanted = {"student": run.sha256, "lr": settings.lr, "threads": torch.get_num_threads()}
    kept = home.load(name)
    if kept is not None and (home.config.get(name) != wanted or kept[1]["epoch"] > settings.epochs):
        home.remove(name)
    home.config[name] = wanted
    home.write_json("config.json", home.config)
    learner.load(home)
    size = run.settings.batch_size
    try:
        for _ in learner.epochs(
            settings.epochs, run.train, size, seed + 3, home, interrupt, on_step
        ):
            say(
                f"{name}: epoch {learner.epoch} of {settings.epochs}, test accuracy "
                f"{learner.measures['accuracy']:.1%}"
            )
    except TrainError as error:
        if not interrupt.wished:
            raise
        raise TrainError(
            "interrupted, and saved: the same command again goes on from here", status=error.status
        ) from None
    loop.accuracy(learner.model, run.test.first(2))  # updates the weights' ranges to the last step
    return model.graph


@contextlib.contextmanager
def _quiet():
    """Without what exporters tell their own developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _input(images: Images) -> dict:
    """How an application makes the file's input from an image."""
    return {
        "input": "images",
        "shape": ["batch", images.channels, images.size, images.size],
        "resize": f"bilinear, antialiased, to {images.size}x{images.size}",
        "divide_by": images.white,
        "mean": images.mean.flatten().tolist(),
        "std": images.std.flatten().tolist(),
        "output": "logits",
        "classes": images.classes,
    }


@contextlib.contextmanager
def _exported(model: nn.Module):
    """Says in one sentence what PyTorch's exporters, called inside, say in many lines."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except TrainError:
        raise
    except Exception as error:  # they raise their own kinds, which name their cause
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        raise TrainError(
            f"the student {type(model).__name__} cannot be exported: {type(cause).__name__}: "
            f"{said[:200]}; ONNX requires operators that it has, and no branches on values",
            status=1,
        ) from None


def _onnx(model: nn.Module, run: _Finished) -> bytes:
    """The model as an ONNX file, batch size free, checked."""
    import onnx

    example = run.test.batch(torch.arange(2) % len(run.test))[0]
    with _exported(model):
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None  # with dynamo
    made = program.model_proto
    onnx.helper.set_model_props(made, {"preprocessing": json.dumps(_input(run.test))})
    # The exporter's notes on where each node came from are a third of a small int8 file.
    for node in made.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


def _session(content: bytes, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """``[b, channels, height, width]`` fp32 to logits ``[b, classes]``, by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": images})[0])


def _logits(model: Callable, images: Images) -> torch.Tensor:
    parts = torch.arange(len(images)).split(256)
    rows = [model(images.batch(part)[0].numpy()) for part in parts]
    return torch.from_numpy(np.concatenate(rows))


def _measured(folder: RunFolder, run: _Finished, files: dict[str, bytes]) -> list[dict]:
    """A row for PyTorch itself and one for each file."""
    threads = torch.get_num_threads()
    eager = run.student.to(memory_format=torch.channels_last)

    def pytorch(images):
        with torch.no_grad():
            images = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            return eager(images).numpy()

    calls = {"pytorch": pytorch} | {n: _session(content, threads) for n, content in files.items()}
    expected = _logits(pytorch, run.test)
    rows = []
    for name, call in calls.items():
        logits = expected if name == "pytorch" else _logits(call, run.test)
        apart = ((logits - expected).abs().max() / expected.abs().max()).item()
        if name == "onnx" and not apart <= TOLERANCE:
            raise TrainError(
                f"onnxruntime's logits differ from PyTorch's by {apart:.1e} of the largest, more "
                f"than {TOLERANCE:g}: the file is not the student",
                status=1,
            )
        chosen = logits.argmax(1)
        size = sum(v.numel() * v.element_size() for v in state_of(run.student).values())
        rows.append(
            {
                "format": name,
                "bytes": size if name == "pytorch" else len(files[name]),
                "accuracy": (chosen == run.test.labels).double().mean().item(),
                "agreement": (chosen == expected.argmax(1)).double().mean().item(),
                "difference": apart,
                "latency": {},
            }
        )
    for size in BATCHES:
        images = run.test.batch(torch.arange(size) % len(run.test))[0].numpy()
        runs = {n: functools.partial(call, images) for n, call in calls.items()}
        times = take_turns(runs, 0, least=ROUNDS)
        base = times["onnx" if "onnx" in times else "pytorch"]
        for row in rows:
            own = sorted(times[row["format"]])
            ratios = [a / b for a, b in zip(base, times[row["format"]], strict=True)]
            row["latency"][str(size)] = {
                "median": statistics.median(own),
                "low": own[len(own) // 10],
                "high": own[-1 - len(own) // 10],
                "speedup": statistics.median(ratios),
            }
    return rows


def run(
    settings: Export, folder: RunFolder, on_step: Callable[[str, int, int], None], say: Callable
) -> dict:
    """Write the files of a finished run of distill, and measure them.

    Returns what export/results.json says now. A format that the student cannot be exported in is
    named and left out; its sentence is under ``"failed"`` by the format.
    """
    with _quiet():  # before any work, so that a missing package is known at once
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
        import torchao

        from kdkernels.tools import int8
    finished = _finished(folder, settings.arm)
    home = folder.path / FOLDER
    home.mkdir(exist_ok=True)
    config = home / "config.json"
    home = RunFolder.open(str(home)) if config.exists() else RunFolder(home, {})
    files: dict[str, bytes] = {}
    failed: dict[str, TrainError] = {}

    def make(name: str) -> bytes:
        if name == "onnx":
            return _onnx(finished.student, finished)
        if name == "int8":
            say(f"{settings.arm}: calibrating on training images")
            with _exported(finished.student):
                graph = int8.calibrate(finished.student, _batches(finished.train, CALIBRATION))
        else:
            graph = _trained(folder, home, finished, settings, interrupt, on_step, say)
        return _onnx(int8.converted(graph), finished)

    with (
        session.reproducible(finished.settings.seed, settings.threads),
        session.Interrupt() as interrupt,
        _quiet(),
    ):
        try:
            for name in settings.formats:
                end, about = FORMATS[name]
                try:
                    files[name] = make(name)
                except TrainError as error:
                    if interrupt.wished:
                        raise
                    failed[name] = error
                    say(f"{about}: {error}")
                    continue
                file = f"{settings.arm}{end}.onnx"
                home.write_bytes(file, files[name])
                say(f"{about}: {home.path / file}")
                if interrupt.wished:
                    raise TrainError(
                        "interrupted: the same command again starts from here", status=130
                    )
            if not files:
                raise next(iter(failed.values()))
            say("measuring")
            rows = _measured(folder, finished, files)
            threads = torch.get_num_threads()
        finally:
            home.close()
    found = home.read_json("results.json") or {"arms": {}}
    found["arms"][settings.arm] = {
        "rows": rows,
        "failed": {name: str(error) for name, error in failed.items()},
        "threads": threads,
        "epochs": settings.epochs,
        "lr": settings.lr,
        "versions": f"torch {torch.__version__}, torchao {torchao.__version__}, onnxruntime "
        f"{onnxruntime.__version__}",
        "input": _input(finished.test),
        "data": finished.settings.data,
        "test_images": len(finished.test),
        "rounds": ROUNDS,
        "calibration": min(CALIBRATION, len(finished.train)),
    }
    home.write_json("results.json", found)
    return found
