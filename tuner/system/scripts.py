"""What the six scripts do alike: exit codes, Ctrl-C, memory full."""


def is_out_of_memory(error):
    """Whether torch says that a GPU's memory is full; whoever asks need not have imported torch."""
    return type(error).__name__ == "OutOfMemoryError"
