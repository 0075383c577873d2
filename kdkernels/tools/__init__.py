"""What works on finished runs and on the ops: the search for settings, the export, the bench."""
