"""A running service: which release answers a model's name, and one thread that answers many in turn."""
