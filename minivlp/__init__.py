"""Vision-language pretraining from scratch: one file per idea, each climbed from NumPy to PyTorch to a fused rung."""
