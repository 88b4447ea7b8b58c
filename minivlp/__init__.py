"""Vision-language pretraining from scratch: one file an idea, from NumPy to PyTorch to a fused rung."""
