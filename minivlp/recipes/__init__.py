"""Ways of training: what a step sees, its loss, and how the result is measured and drawn."""
