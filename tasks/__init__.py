"""Where arrays meet machines: one kind of distributed work a file."""
