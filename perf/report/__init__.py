"""Rows of layers as tables, Markdown and plots, and against those of an earlier run."""
