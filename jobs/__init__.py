"""What runs on top of a cluster: the command line, loading, sinking, the demonstration."""
