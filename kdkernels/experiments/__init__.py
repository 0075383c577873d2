"""Experiments 1, 3 and 4, which stand on :mod:`kdkernels.train`; experiment 2 is its own."""
