"""Reports: what a run starts from, what it ends with, and what a configuration would do."""
