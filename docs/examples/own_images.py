"""Your own two models and folder of images: photos/train/CLASS/*.jpg, photos/test/CLASS/*.jpg."""

import sys

import torch
from torchvision import models

from kdkernels import reports
from kdkernels.train import distill, image_folder

photos, weights = sys.argv[1:3] if len(sys.argv) > 2 else ("photos", "teacher.pth")

train, test = image_folder(photos, size=64)
teacher = models.resnet18(num_classes=train.classes)
teacher.load_state_dict(torch.load(weights))
student = models.mobilenet_v3_small(num_classes=train.classes)
found = distill(
    teacher, student, train, test, epochs=5, temperature=4.0, alpha=0.7, report=reports.write
)
torch.save(found.student.state_dict(), "student.pth")
print(f"test accuracy {found.accuracy:.1%}; curves and times: {found.folder}/report.html")
