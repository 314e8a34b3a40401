"""What a table of algorithms is about: examples, models for many workers at once, and how good one is."""

from benchmarks.problems.images import Images
from benchmarks.problems.problem import Measure, Problem, Split
from benchmarks.problems.text import Text

__all__ = ["Images", "Measure", "Problem", "Split", "Text"]
