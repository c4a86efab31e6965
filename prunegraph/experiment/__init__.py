"""The commands: options, runs that go on where they ended, comparisons, reports."""
