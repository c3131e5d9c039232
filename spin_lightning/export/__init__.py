"""Handing a run over: an iterate as a model folder, or its rows as a preference data set.

Every folder is checked by plain transformers and PEFT before it gets its name.
"""
