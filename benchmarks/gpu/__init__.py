"""What fxckpt does on a real GPU: bits and peaks, time against what torch offers, and training where eager can't."""
