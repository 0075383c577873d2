"""What a person sees of a run in the terminal: progress bars, lines and tables."""

from collections.abc import Callable

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


def make(quiet: bool = False) -> Console:
    """A console for stdout; ``quiet``: one that shows nothing."""
    console = Console(markup=False, highlight=False, quiet=quiet)
    if console.is_terminal:
        return console
    # A pipe or a log file has no width of its own; tables must not be folded at 80.
    return Console(width=170, markup=False, highlight=False, quiet=quiet)


def progress(run: Callable, settings, folder, console: Console, **more):
    """What ``run(settings, folder, on_step, say, **more)`` returns, called under progress bars."""
    columns = (
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("steps"), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def on_step(learner, done, total):
            if learner not in tasks:
                tasks[learner] = bars.add_task(learner, total=total)
            bars.update(tasks[learner], completed=done)

        return run(settings, folder, on_step, bars.console.print, **more)


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
