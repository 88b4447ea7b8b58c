"""The course: chapters in percent format, their notebooks, and the learner's exercises."""
