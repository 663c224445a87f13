"""The loop over rounds, what it records, and the command line."""
