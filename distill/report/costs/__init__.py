"""What a model costs where it is served."""
