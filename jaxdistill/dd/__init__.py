"""Data set distillation: many real examples into a few synthetic ones."""
