"""What runs have to show, as tables, plots and one page: :func:`write`."""

from kdkernels.reports.report import write

__all__ = ["write"]
