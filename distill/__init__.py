"""Knowledge distillation: one YAML pairs a frozen teacher with a student and trains it."""

__version__ = "0.1.0"
