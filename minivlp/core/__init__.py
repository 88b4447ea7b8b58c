"""What the ideas may import: checks of arguments, transport kernels, files written whole."""
