"""What a Llama is: configuration, weights and the decoder, in torch."""
