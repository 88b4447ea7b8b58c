"""Published models: the names of their tensors, their files, and how they want their images."""
