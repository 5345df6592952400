"""The vocabulary every other package speaks: values only, no I/O, imports nothing of ours."""
