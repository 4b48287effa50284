"""TensorRT engines: built from a bundle's graph, kept in the user's cache, run by a backend."""
