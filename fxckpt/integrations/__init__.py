"""Where fxckpt meets what people train with."""
