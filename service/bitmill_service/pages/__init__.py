"""Web pages over the public API: the same functions answer, people's browsers look."""
