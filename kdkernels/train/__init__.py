"""The thin trainer behind ``kdkernels soft-reg``, ``distill`` and ``reproduce``.

Models and data are torchvision's and scikit-learn's, files are safetensors and JSON lines; the
modules here only join them:

- ``soft_regression``: experiment 1, linear regression under Gaussian input noise
- ``distillation``: experiment 2, ResNet-18 to MobileNetV2 in four arms
- ``data``, ``models``, ``loop``: what experiment 2 trains on, what it trains, and how
- ``export``, ``int8``: a finished student as ONNX files in fp32 and int8
- ``run_folder``: everything a run leaves on disk, and how it is read again
- ``report``: the tables, the plots and ``report.html``
"""

__all__ = ["TrainError"]


class TrainError(Exception):
    """A run that cannot start or go on, said in one sentence for the person who started it.

    Args:
        message: the sentence, without a trailing newline.
        status: exit status of the command: 2 for bad arguments or missing data (default), 1 for
            a run that failed on the way, 130 for one that was interrupted.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
