"""What the terminal shows of a run: progress bars, lines and tables."""

import contextlib
from collections.abc import Callable, Generator

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kdkernels.train.images import OnStep


def make(quiet: bool = False) -> Console:
    """A console for stdout; ``quiet``: one that shows nothing."""
    console = Console(markup=False, highlight=False, quiet=quiet)
    if console.is_terminal:
        return console
    # A pipe or a log file has no width of its own; tables must not be folded at 80.
    return Console(width=170, markup=False, highlight=False, quiet=quiet)


@contextlib.contextmanager
def progress(console: Console) -> Generator[tuple[OnStep, Callable]]:
    """Inside, progress bars: gives ``on_step(name, done, total)``, and a print beside them."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def on_step(name, done, total):
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield on_step, bars.console.print


def show(console: Console, tables) -> None:
    """Print :class:`kdkernels.reports.report.Table` s."""
    for table in tables:
        drawn = Table(title=table.title, box=box.MARKDOWN, title_justify="left", title_style="bold")
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        if table.note:
            console.print(table.note, style="dim")
