"""What a run has to show: tables, plots and pages."""
