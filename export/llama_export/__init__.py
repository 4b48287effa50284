"""Turn a Llama checkpoint into a bundle that runs without torch."""
