"""Tasks on the command line: a file a task, an entry in ``registry`` each."""
