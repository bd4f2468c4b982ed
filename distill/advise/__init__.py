"""What to do with a model that is too big: distil, quantise, prune, or several of them, with figures for this model on this machine."""
