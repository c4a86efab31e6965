"""What everything hangs on: masks, budgets, splits, errors, files."""
