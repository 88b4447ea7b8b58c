"""Pictures of runs and answers, and the demos."""
