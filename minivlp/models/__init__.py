"""Models: each file assembles the concepts of the library into one published architecture."""
