"""Split learning: a model cut in two halves, the messages between them, and both sides of an
iteration.
"""
