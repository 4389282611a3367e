"""Convolutional nets as data: what `lm` is for transformers. All of a net is trained, so nothing is
frozen.
"""
