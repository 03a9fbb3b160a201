"""Giving the batch norm layers of a model another class: convert.py exchanges, the rest reads what
their forwards do (subclass_forward.py, method_reader.py) and folds in what follows them (fuse.py,
followers.py, plain_forward.py).
"""
