"""The methods, one file each; a file's ``METHOD`` is a subclass of ``losses.method.Method``.

A config is checked on machines without torch, so methods import torch only when they compute.
"""
