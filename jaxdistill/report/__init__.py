"""The pictures and tables of a run."""
