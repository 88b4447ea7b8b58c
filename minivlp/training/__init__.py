"""Training runs: the loop, the run folder, trained models, several processes, what the screen shows."""
