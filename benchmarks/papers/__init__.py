"""The papers' comparisons at small shapes, as a list of runs that can be stopped and continued.

`python -m benchmarks.papers` does what the list has and docs/papers.json lacks.
"""
