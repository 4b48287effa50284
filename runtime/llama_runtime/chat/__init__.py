"""A chat in a terminal, or in a pipe: messages in, answers out as they come."""
