"""Imported first: transformers' advice to install PyTorch is not for us, who only tokenize."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
