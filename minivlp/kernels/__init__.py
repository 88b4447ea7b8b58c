"""The tile loop of stream.py once more in Triton, with its losses; imported when a CUDA tensor comes."""
