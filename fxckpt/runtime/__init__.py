"""A planned step under autograd."""
