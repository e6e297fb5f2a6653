"""Services around the training loop: signals, locks, faults, output and adaptations to the CPU."""
