"""Split learning: a model cut in two halves, what goes between them, and both sides of an
iteration.
"""
