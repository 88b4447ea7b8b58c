"""The tile loop of stream.py in Triton, with its losses; imported only when a tensor on a GPU comes."""
