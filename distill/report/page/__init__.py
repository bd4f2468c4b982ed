"""The page: blocks that chapters are made of, plots, and the template."""
