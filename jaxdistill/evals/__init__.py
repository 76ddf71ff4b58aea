"""Judging a model: negative log-likelihood, divergence from the teacher, agreement, bytes."""
