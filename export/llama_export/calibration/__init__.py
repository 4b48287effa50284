"""What a model reads while its weights are rounded: texts that the package ships."""
