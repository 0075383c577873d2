"""What `make nightly` runs beside `make test`: see CONTRIBUTING.md.

The environment variable KDKERNELS_NIGHTLY=1, which tests' own processes inherit, asks for it.
"""

import os

NIGHTLY = os.environ.get("KDKERNELS_NIGHTLY", "0") != "0"
# Set where a file's tests run once more, on another ISA level or device.
AGAIN = os.environ.get("KDKERNELS_TESTED_AGAIN", "0") != "0"


def of_night(everything, by_day):
    """`everything` at night, else a part of it."""
    return everything if NIGHTLY else by_day


def examples(number):
    """So many examples of a property; by day a tenth where its tests run once more."""
    return number // 10 if AGAIN and not NIGHTLY else number
