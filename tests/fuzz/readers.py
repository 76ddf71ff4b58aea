"""The readers of files that others wrote: valid small files for each, and what reading them is."""

from tests.fuzz import data, models, runs

READERS = models.READERS | runs.READERS | data.READERS
