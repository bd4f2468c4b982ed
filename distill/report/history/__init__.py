"""What the log of a run tells: series, curves, whether it converged."""
