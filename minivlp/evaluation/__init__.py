"""What trained models can do, measured with intervals beside chance."""
